"""Importance matrices: right sums under right names, the same as llama.cpp's, and better models for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_converter import gguf
from finery_converter.gguf_parity import GgufModel, compare
from finery_converter.importance import ImportanceCollector, collect, load, tensor_names
from finery_converter.quantize import quantize

IDS = [[(7919 * place + 31 * row) % 49152 for place in range(48)] for row in range(3)]
# Asks llama.cpp itself what every matrix is multiplied by: a callback for each node of its graph, which reads both operands in place.
# Offsets are those of ggml_tensor: ne at 16, src at 152, data at 248, name at 256.
LLAMA_CPP = """
import ctypes, json, sys
import numpy as np
from finery_converter import libllama

request = json.loads(sys.argv[1])
library = libllama.Library(lambda level, text: None, with_kernels=True)
api, base = library.functions, ctypes.CDLL(str(libllama._folder() / "lib" / "libggml-base.so.0"))
base.ggml_op_desc.restype, base.ggml_op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
sums = {}

def at(tensor, offset, kind):
    return kind.from_address(tensor + offset).value

def see(tensor, ask, _):
    if base.ggml_op_desc(tensor) != b"MUL_MAT":
        return not ask
    if not ask:
        matrix, x = at(tensor, 152, ctypes.c_void_p), at(tensor, 160, ctypes.c_void_p)
        name = ctypes.string_at(matrix + 256).decode()
        width, rows = at(x, 16, ctypes.c_int64), at(x, 24, ctypes.c_int64)
        if name.startswith("blk.") and name.endswith(".weight"):
            data = np.ctypeslib.as_array((ctypes.c_float * (width * rows)).from_address(at(x, 248, ctypes.c_void_p))).reshape(rows, width)
            total, count = sums.get(name, (0, 0))
            sums[name] = total + np.square(data.astype(np.float64)).sum(axis=0), count + rows
    return True

params = api.llama_model_default_params()
params.n_gpu_layers, params.use_extra_bufts = 0, False
model = api.llama_model_load_from_file(request["file"].encode(), params)
settings = api.llama_context_default_params()
callback = libllama.EvalCallback(see)
settings.cb_eval, settings.n_threads_batch = callback, 1
settings.type_k = settings.type_v = settings.flash_attn_type = 0
context = api.llama_init_from_model(model, settings)
for ids in request["ids"]:
    api.llama_memory_clear(api.llama_get_memory(context), True)
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for index, token in enumerate(ids):
        batch.token[index], batch.pos[index], batch.n_seq_id[index], batch.logits[index] = token, index, 1, 1
        batch.seq_id[index][0] = 0
    assert api.llama_decode(context, batch) == 0
np.savez(request["out"], **{name: (total / count).astype(np.float32) for name, (total, count) in sums.items()})
"""


def _nothing(_share: float) -> None:
    return


def _matrix(folder: Path, file: Path, ids: list[list[int]], out: Path, converter_dir: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = tensor_names(file, [name for name, _ in model.named_modules()], converter_dir=converter_dir)
    collector = ImportanceCollector(names)
    collect(model, ids, collector, on_progress=_nothing)
    collector.save(out, dataset="test", chunk_size=len(ids[0]))
    return out


def test_a_matrix_holds_the_mean_squares_of_what_a_layer_was_given(tmp_path):
    torch.manual_seed(3)
    model, x, y = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), torch.randn(5, 6), torch.randn(2, 3, 6)
    collector = ImportanceCollector({"0": ("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight")})
    with collector.watch(model):
        model(x)
        model(y)
    model(1000 * x)
    collector.save(tmp_path / "importance.gguf", dataset="test", chunk_size=5)
    found = load(tmp_path / "importance.gguf")
    assert list(found) == ["blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"]
    wanted = torch.cat([x, y.reshape(6, 6)]).double().square().mean(dim=0).numpy()
    for values in found.values():
        np.testing.assert_allclose(values, wanted, rtol=1e-6)


def test_an_input_that_calibration_never_saw_counts_a_little(tmp_path):
    collector = ImportanceCollector({"it": ("blk.0.ffn_up.weight",)})
    collector("it", torch.tensor([[1.0, 0.0]]))
    collector.save(tmp_path / "importance.gguf", dataset="test", chunk_size=1)
    values = load(tmp_path / "importance.gguf")["blk.0.ffn_up.weight"]
    assert 0 < values[1] < 1e-5 * values[0]


def test_a_llama_models_matrices_are_called_as_its_gguf_file_calls_them(make_speaker, converter_dir, tmp_path):
    folder, file = make_speaker(), tmp_path / "model.gguf"
    gguf.convert(folder, file, type_="f16", model_name="test", converter_dir=converter_dir, on_progress=_nothing)
    modules = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.norm", "model.embed_tokens", "lm_head", "else"]
    assert tensor_names(file, modules, converter_dir=converter_dir) == {
        "model.layers.1.mlp.down_proj": ("blk.1.ffn_down.weight",),
        "model.layers.0.self_attn.q_proj": ("blk.0.attn_q.weight",),
    }


@pytest.mark.slow
def test_the_matrix_is_what_llama_cpp_itself_multiplies_by(make_speaker, converter_dir, tmp_path):
    folder, file = make_speaker(), tmp_path / "model.gguf"
    gguf.convert(folder, file, type_="f32", model_name="test", converter_dir=converter_dir, on_progress=_nothing)
    ours = load(_matrix(folder, file, IDS, tmp_path / "importance.gguf", converter_dir))
    request = json.dumps({"file": str(file), "ids": IDS, "out": str(tmp_path / "theirs.npz")})
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP, request], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "theirs.npz")
    assert sorted(theirs.files) == sorted(ours)
    assert len(ours) == 14
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-3, atol=1e-5 * float(values.max()), err_msg=name)


@pytest.mark.slow
def test_each_expert_has_the_importance_of_what_it_was_given_and_is_quantized_by_it(make_speaker, converter_dir, tmp_path):
    folder, file = make_speaker(experts=4), tmp_path / "model.gguf"
    gguf.convert(folder, file, type_="f16", model_name="test", converter_dir=converter_dir, on_progress=_nothing)
    matrix = load(_matrix(folder, file, IDS, tmp_path / "importance.gguf", converter_dir))
    assert {matrix[f"blk.0.ffn_{name}_exps.weight"].size for name in ("gate", "up", "down")} == {4 * 256}

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    given: list[list[torch.Tensor]] = [[] for _ in range(4)]
    inside: list[list[torch.Tensor]] = [[] for _ in range(4)]

    def see(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        for row, chosen in zip(args[0], args[1], strict=True):
            for expert in chosen.tolist():
                gate, up = (experts.gate_up_proj[expert].double() @ row.double()).chunk(2)
                given[expert].append(row.double())
                inside[expert].append(torch.nn.functional.silu(gate) * up)

    experts.register_forward_pre_hook(see)
    with torch.no_grad():
        for ids in IDS:
            model(input_ids=torch.tensor([ids]))
    for name, rows in (("gate", given), ("up", given), ("down", inside)):
        wanted = torch.cat([torch.stack(of_one).square().mean(dim=0) for of_one in rows]).numpy()
        np.testing.assert_allclose(matrix[f"blk.0.ffn_{name}_exps.weight"], wanted, rtol=1e-4)

    result = quantize(file, tmp_path / "small.gguf", type_="iq3_xxs", importance=tmp_path / "importance.gguf", on_progress=_nothing)
    assert result.without_importance == ()
    both = compare(GgufModel(file=file), GgufModel(file=result.files[0]), IDS[:1], on_progress=_nothing, num_threads=1)
    assert 0 < both.mean_kl < 5


@pytest.mark.slow
def test_smollm2_is_nearer_to_itself_with_a_matrix(base_model_dir, converter_dir, tmp_path):
    file, tokenizer = tmp_path / "model.gguf", AutoTokenizer.from_pretrained(base_model_dir)
    gguf.convert(base_model_dir, file, type_="f16", model_name="test", converter_dir=converter_dir, on_progress=_nothing)
    texts = [Path(__file__).parents[3] / name for name in ("README.md", "CONTRIBUTING.md")]
    calibration, judged = (tokenizer(text.read_text())["input_ids"] for text in texts)
    importance = _matrix(base_model_dir, file, [calibration[:256], calibration[256:512]], tmp_path / "importance.gguf", converter_dir)
    distances = []
    for matrix in (None, importance):
        small = quantize(file, tmp_path / "small.gguf", type_="q2_k", importance=matrix, on_progress=_nothing).files[0]
        distances.append(compare(GgufModel(file=file), GgufModel(file=small), [judged[:256]], on_progress=_nothing).mean_kl)
    without, with_matrix = distances
    assert with_matrix < 0.85 * without


def test_a_matrix_of_nothing_or_of_nothing_finite_is_refused(tmp_path):
    collector = ImportanceCollector({"it": ("blk.0.ffn_up.weight",)})
    collector("another", torch.ones(1, 2))
    with pytest.raises(FailedPreconditionError, match="no calibration text"):
        collector.save(tmp_path / "importance.gguf", dataset="test", chunk_size=1)
    collector("it", torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(InvalidArgumentError, match=r"inputs to blk\.0\.ffn_up\.weight are not finite"):
        collector.save(tmp_path / "importance.gguf", dataset="test", chunk_size=1)


def test_another_file_is_no_matrix(tmp_path):
    (tmp_path / "text.gguf").write_text("text" * 100)
    with pytest.raises(InvalidArgumentError, match=r"text.gguf is no importance matrix"):
        load(tmp_path / "text.gguf")
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidArgumentError, match="a GGUF file, but no importance matrix"):
        load(tmp_path / "model.gguf")
