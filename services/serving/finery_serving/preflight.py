"""Whether vLLM can serve an adapter as it was trained, judged from its files before vLLM sees them.

Owns the reading of `adapter_config.json` and of safetensors. Bytes and digests were checked when they were staged. vLLM ignores
what it does not know, so anything that would change the result is refused here.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np

from finery_common.artifacts import Manifest
from finery_common.errors import FailedPreconditionError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
# Of experts by the thousand; parsed, it takes ten times as much.
_MAX_HEADER_BYTES = 16 << 20
_MAX_MESSAGE = 1000
_DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
# Each with the bits of its exponent: all of them are set in NaN and the infinities only.
_SERVABLE_DTYPES: Mapping[str, int] = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
_SCAN_BYTES = 8 << 20
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# What vLLM cannot do, by the field of PEFT's configuration that asks for it.
_UNSERVABLE: Mapping[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "a bias in B",
    "modules_to_save": "modules trained in full",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "rank_pattern": "ranks that differ by module",
    "alpha_pattern": "an alpha that differs by module",
}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class BaseModel:
    """The model that is served: `shapes` has each weight's shape, (out, in) for a linear layer."""

    name: str
    sha256: str
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]


def check_sizes(manifest: Manifest) -> None:
    """Raises FailedPreconditionError where a file that is read whole is too large for that; asked before anything is copied."""
    config = manifest.entry(CONFIG_NAME)
    if config is not None and config.size_bytes > _MAX_CONFIG_BYTES:
        raise _refused(f"{CONFIG_NAME} has {config.size_bytes} bytes, at most {_MAX_CONFIG_BYTES} are read")


def check_manifest(manifest: Manifest, *, base: BaseModel) -> None:
    """Raises FailedPreconditionError where the artifact is no adapter of `base`, with its digest, or lacks a file."""
    if manifest.kind != "adapter":
        raise _refused(f"got an artifact of kind {manifest.kind}, wanted an adapter")
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if manifest.entry(name) is None]
    if missing:
        raise _refused(f"the artifact lacks {' and '.join(missing)}; only PEFT adapters in safetensors are served")
    pickles = [entry.name for entry in manifest.objects if PurePosixPath(entry.name).suffix.lower() in _PICKLES]
    if pickles:
        raise _refused(f"the artifact has {pickles[0]}, whose kind runs code when it is read; only safetensors are served")
    name, sha256 = manifest.metadata.get("base_model"), manifest.metadata.get("base_model_sha256")
    if name != base.name:
        raise _refused(f"it was trained on {name!r}, but {base.name!r} is served", code="wrong_base_model")
    if sha256 != base.sha256:
        raise _refused(
            f"it was trained on other weights called {base.name!r}: got SHA-256 {sha256}, wanted {base.sha256}; train it again",
            code="wrong_base_model",
        )


def check_adapter(folder: Path, *, base: BaseModel, max_lora_rank: int) -> None:
    """Raises FailedPreconditionError where the adapter in `folder` cannot be served on `base`."""
    rank = _check_config(_read_config(folder / CONFIG_NAME), max_lora_rank=max_lora_rank)
    tensors = read_header(folder / WEIGHTS_NAME)
    _check_tensors(tensors, rank=rank, base=base)
    _check_finite(folder / WEIGHTS_NAME, tensors)


def base_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of every weight in the safetensors files of a model folder."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shapes |= {name: tensor.shape for name, tensor in read_header(file).items()}
    if not shapes:
        raise FailedPreconditionError(f"The base model's folder {folder} has no safetensors; only models in safetensors are served.")
    return shapes


def read_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors that a safetensors file describes. Raises FailedPreconditionError unless they fill the file exactly."""
    size_bytes = file.stat().st_size
    with file.open("rb") as source:
        prefix = source.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise _refused(f"{file.name} is no safetensors file, or is truncated")
        try:
            spans = _spans(json.loads(source.read(length)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _refused(f"the header of {file.name} cannot be read") from error
    position = 0
    for begin, end, name, tensor in spans:
        if begin != position or end - begin != math.prod(tensor.shape) * _DTYPE_BYTES.get(tensor.dtype, 0):
            raise _refused(f"{file.name}: the bytes of {name} are not what its shape {list(tensor.shape)} of {tensor.dtype} takes")
        position = end
    if position != size_bytes - 8 - length:
        raise _refused(f"{file.name} is truncated: got {size_bytes - 8 - length} bytes of tensors, wanted {position}")
    return {name: tensor for _, _, name, tensor in spans}


def _spans(header: dict[str, Any]) -> list[tuple[int, int, str, TensorHeader]]:
    """Begin, end, name and tensor, in order. Raises one of the errors of wrong types where the header is none."""
    found: list[tuple[int, int, str, TensorHeader]] = []
    for name, item in header.items():
        if name != "__metadata__":
            begin, end = item["data_offsets"]
            numbers = (begin, end, *item["shape"])
            if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(item["dtype"], str):
                raise TypeError(name)
            found.append((begin, end, name, TensorHeader(item["dtype"], tuple(item["shape"]))))
    return sorted(found, key=itemgetter(0, 1))


def _read_config(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise _refused(f"{CONFIG_NAME} has {file.stat().st_size} bytes, at most {_MAX_CONFIG_BYTES} are read")
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise _refused(f"{CONFIG_NAME} is no JSON") from error
    if not isinstance(config, dict):
        raise _refused(f"{CONFIG_NAME} is no JSON object")
    return cast("dict[str, Any]", config)


def _check_config(config: Mapping[str, Any], *, max_lora_rank: int) -> int:
    if config.get("peft_type") != "LORA":
        raise _refused(f"peft_type: got {config.get('peft_type')!r}, wanted 'LORA'")
    if config.get("bias", "none") != "none":
        raise _refused(f"bias: got {config.get('bias')!r}, wanted 'none'; vLLM has no biases in adapters")
    for field, what in _UNSERVABLE.items():
        if config.get(field):
            raise _refused(f"{field} is set: vLLM cannot serve {what}; merge the adapter into its base to use it")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise _refused(
            f"init_lora_weights {init!r} changes the base model, which other adapters share; merge the adapter into its base to use it"
        )
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _refused(f"r: got {rank!r}, wanted a whole number above 0")
    if rank > max_lora_rank:
        raise _refused(f"rank: got {rank}, at most {max_lora_rank} is served; train with a lower rank or raise FINERY_MAX_LORA_RANK")
    alpha = config.get("lora_alpha")
    # JSON's whole numbers have no bound, floats have one.
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= sys.float_info.max:
        raise _refused(f"lora_alpha: got {alpha!r}, wanted a finite number")
    return rank


def _check_tensors(tensors: Mapping[str, TensorHeader], *, rank: int, base: BaseModel) -> None:
    sides: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise _refused(f"the tensor {name[:200]!r} is not the A or B of a LoRA layer")
        module, side = match["module"], match["side"]
        out_in = base.shapes.get(f"{module}.weight")
        if out_in is None or len(out_in) != 2 or module.endswith("embed_tokens"):
            raise _refused(f"{module[:200]!r} is no linear layer of {base.name}")
        wanted = (rank, out_in[1]) if side == "A" else (out_in[0], rank)
        if tensor.shape != wanted:
            raise _refused(f"{name}: got shape {list(tensor.shape)}, wanted {list(wanted)}")
        if tensor.dtype not in _SERVABLE_DTYPES:
            raise _refused(f"{name}: got {tensor.dtype}, wanted one of {', '.join(sorted(_SERVABLE_DTYPES))}")
        sides.setdefault(module, set()).add(side)
    if not sides:
        raise _refused(f"{WEIGHTS_NAME} has no tensors")
    for module, found in sides.items():
        if found != {"A", "B"}:
            raise _refused(f"{module} has lora_{found.pop()} only, wanted A and B")


def _check_finite(file: Path, tensors: Mapping[str, TensorHeader]) -> None:
    """Looks at every number of `tensors`, which fill the end of `file` in their order."""
    sizes = {name: math.prod(tensor.shape) * _DTYPE_BYTES[tensor.dtype] for name, tensor in tensors.items()}
    with file.open("rb") as source:
        source.seek(-sum(sizes.values()), os.SEEK_END)
        for name, size_bytes in sizes.items():
            dtype = tensors[name].dtype
            for position in range(0, size_bytes, _SCAN_BYTES):
                chunk = source.read(min(size_bytes - position, _SCAN_BYTES))
                exponents = np.frombuffer(chunk, f"<u{_DTYPE_BYTES[dtype]}") & _SERVABLE_DTYPES[dtype]
                if (exponents == _SERVABLE_DTYPES[dtype]).any():
                    message = f"{name} has weights that are no finite numbers; train again, with a lower learning rate"
                    raise _refused(message, code="adapter_not_finite")


def _refused(message: str, *, code: str = "adapter_not_servable") -> FailedPreconditionError:
    # The words may be the adapter's own.
    return FailedPreconditionError(f"The adapter cannot be served: {message[:_MAX_MESSAGE]}.", code=code)
