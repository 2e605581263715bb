"""How a merged tensor is written: cast to one type, or quantized as NF4 (bitsandbytes) or FP8 (compressed-tensors).

Owns the arithmetic of each form, the tensors that a weight becomes in the files, and what config.json has to say for transformers and vLLM
to load them. Every value is rounded once, from the float32 merge: no 16-bit folder lies between. Leaves which weights are quantized to
`layers`, and where the rows come from to `merge`.

Letters: R rows of a block, K columns, B blocks of quantization.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch

from finery_common.errors import InvalidArgumentError
from finery_converter import nf4
from finery_converter.pipeline import Buffers, WriteBehind
from finery_converter.tensorfiles import TensorSpec, TensorWriter

Form = Literal["nf4", "fp8", "fp8_block"]
FP8 = torch.float8_e4m3fn
FP8_BLOCK = 128
_FP8_MAX = torch.finfo(FP8).max
_CHUNK_ELEMENTS = 128 * 1024
_LAST_OR_ALONE = ("v_proj", "o_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2", "dense")
"""Layers that vLLM puts nothing after when it fuses layers into one; others must end with a whole block of rows."""


class Sink:
    """Where encoded tensors go: one file, written by another thread."""

    def __init__(self, writer: TensorWriter, behind: WriteBehind, buffers: Buffers) -> None:
        self._writer = writer
        self._behind = behind
        self._buffers = buffers

    def cast(self, name: str, values_RK: torch.Tensor, dtype: torch.dtype) -> None:
        """Appends `values_RK`, rounded to `dtype`, to the tensor `name`."""
        lease = self._buffers.take(values_RK.numel() * dtype.itemsize)
        lease.data.view(dtype).view(values_RK.shape).copy_(values_RK)

        def write() -> None:
            self._writer.append(name, lease.data)
            lease.release()

        self._behind.submit(write)

    def append(self, name: str, data: torch.Tensor) -> None:
        """Appends `data`, which is not to be changed afterwards, to the tensor `name`."""
        self._behind.submit(partial(self._writer.append, name, data))


class Encoding(Protocol):
    """One form of a weight in the files."""

    def specs(self, name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
        """The tensors that the weight becomes. Raises InvalidArgumentError for a shape that the form has no place for."""
        ...

    def encode(self, name: str, shape: tuple[int, ...], blocks: Iterator[torch.Tensor], sink: Sink) -> None:
        """Takes the weight's values as float32 [R, K] in order, all finite, and hands the tensors to `sink`."""
        ...

    def quantization_config(self, kept: list[str]) -> dict[str, object] | None:
        """What config.json says; `kept` are linear layers that are not quantized."""
        ...


@dataclass(frozen=True)
class Cast:
    """Values in one floating-point type."""

    dtype: torch.dtype

    def specs(self, name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
        return [(name, self.dtype, shape)]

    def encode(self, name: str, shape: tuple[int, ...], blocks: Iterator[torch.Tensor], sink: Sink) -> None:
        for values_RK in blocks:
            sink.cast(name, values_RK, self.dtype)

    def quantization_config(self, kept: list[str]) -> dict[str, object] | None:
        return None


@dataclass(frozen=True)
class Nf4:
    """bitsandbytes' NF4, blocks of 64, double quantization, in the layout that transformers saves and vLLM reads.

    Codes are the nearest ones, as on a GPU. `dtype` is what values are dequantized to.
    """

    dtype: torch.dtype

    def specs(self, name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
        num_elements = shape[0] * shape[1]
        num_blocks = -(-num_elements // nf4.BLOCK)
        return [
            (name, torch.uint8, ((num_elements + 1) // 2, 1)),
            (f"{name}.absmax", torch.uint8, (num_blocks,)),
            (f"{name}.quant_map", torch.float32, (16,)),
            (f"{name}.nested_absmax", torch.float32, (-(-num_blocks // nf4.NESTED_BLOCK),)),
            (f"{name}.nested_quant_map", torch.float32, (256,)),
            (f"{name}.{nf4.STATE_KEY}", torch.uint8, (nf4.STATE_BYTES,)),
        ]

    def encode(self, name: str, shape: tuple[int, ...], blocks: Iterator[torch.Tensor], sink: Sink) -> None:
        absmax: list[torch.Tensor] = []
        for values_RK in blocks:
            packed: list[torch.Tensor] = []
            for chunk in values_RK.reshape(-1).split(_CHUNK_ELEMENTS):
                absmax.append(nf4.block_absmax(chunk))
                packed.append(nf4.pack(nf4.codes(chunk, absmax[-1], arithmetic="gpu")))
            sink.append(name, torch.cat(packed))
        scales = nf4.nest(torch.cat(absmax), arithmetic="gpu")
        sink.append(f"{name}.absmax", scales.codes_B)
        sink.append(f"{name}.quant_map", nf4.code_16())
        sink.append(f"{name}.nested_absmax", scales.nested_absmax_C)
        sink.append(f"{name}.nested_quant_map", nf4.code_256())
        sink.append(f"{name}.{nf4.STATE_KEY}", nf4.state_text(shape, dtype=self.dtype, offset=scales.offset))

    def quantization_config(self, kept: list[str]) -> dict[str, object] | None:
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": str(self.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": kept,
            "llm_int8_threshold": 6.0,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }


@dataclass(frozen=True)
class Fp8:
    """compressed-tensors' `float-quantized` e4m3: a scale for each row, or for each 128 x 128 block; activations are
    quantized as they come.

    A scale is the largest magnitude by 448, rounded up to bfloat16: then every loader has the same scale, whichever type it keeps it
    in, and no value is cut off.
    """

    is_block: bool = False

    def specs(self, name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
        num_rows, num_columns = shape
        module = name.removesuffix(".weight")
        is_whole = num_rows % FP8_BLOCK == 0 or module.endswith(_LAST_OR_ALONE)
        if self.is_block and (num_columns % FP8_BLOCK or not is_whole):
            raise InvalidArgumentError(
                f"type: fp8_block wants sizes that are multiples of {FP8_BLOCK}, and {name} is {list(shape)}: activations are quantized in "
                "blocks of columns, and vLLM fuses layers by blocks of rows; use fp8.",
                param="type",
                code="unsupported_type",
            )
        scales = (-(-num_rows // FP8_BLOCK), -(-num_columns // FP8_BLOCK)) if self.is_block else (num_rows, 1)
        return [(name, FP8, shape), (f"{module}.weight_scale", torch.bfloat16, scales)]

    def encode(self, name: str, shape: tuple[int, ...], blocks: Iterator[torch.Tensor], sink: Sink) -> None:
        scale_name = f"{name.removesuffix('.weight')}.weight_scale"
        for values_RK in blocks:
            for rows_RK in values_RK.split(FP8_BLOCK):
                scales = fp8_scales(_block_peaks(rows_RK) if self.is_block else _row_peaks(rows_RK))
                sink.append(scale_name, scales.to(torch.bfloat16))
                sink.append(name, _to_fp8(rows_RK, scales))

    def quantization_config(self, kept: list[str]) -> dict[str, object] | None:
        common: dict[str, object] = {"num_bits": 8, "type": "float", "symmetric": True}
        weights: dict[str, object] = {"dynamic": False, "strategy": "block" if self.is_block else "channel"}
        inputs: dict[str, object] = {"dynamic": True, "strategy": "group" if self.is_block else "token"}
        if self.is_block:
            weights["block_structure"] = [FP8_BLOCK, FP8_BLOCK]
            inputs["group_size"] = FP8_BLOCK
        group = {"format": "float-quantized", "targets": ["Linear"], "weights": common | weights, "input_activations": common | inputs}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"output_activations": None}},
            "ignore": kept,
            "kv_cache_scheme": None,
        }


def encoding_of(form: Form, *, dtype: torch.dtype) -> Encoding:
    """The encoding of linear layers' weights; `dtype` is that of all other tensors."""
    return Nf4(dtype) if form == "nf4" else Fp8(is_block=form == "fp8_block")


def fp8_scales(peaks: torch.Tensor) -> torch.Tensor:
    """Scales for largest magnitudes `peaks` (fp32): fp32 numbers that bfloat16 holds, never below peak / 448; 1 where all is 0."""
    scales = (peaks / _FP8_MAX).clamp(min=torch.finfo(torch.bfloat16).tiny)
    # The bits of a positive bfloat16 are the upper half of its fp32 bits: one added to their last, where the lower half is not 0.
    rounded = ((scales.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    return torch.where(peaks > 0, rounded, torch.ones_like(rounded))


def _row_peaks(rows_RK: torch.Tensor) -> torch.Tensor:
    lowest, highest = torch.aminmax(rows_RK, dim=1, keepdim=True)
    return torch.maximum(-lowest, highest)


def _block_peaks(rows_RK: torch.Tensor) -> torch.Tensor:
    """[1, blocks of columns] of at most 128 rows; the last block may be narrow."""
    lowest, highest = torch.aminmax(rows_RK, dim=0)
    peaks_K = torch.maximum(-lowest, highest)
    padded = torch.nn.functional.pad(peaks_K, (0, -peaks_K.numel() % FP8_BLOCK))
    return padded.view(1, -1, FP8_BLOCK).amax(2)


def _to_fp8(rows_RK: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    if scales.shape[1] > 1 or scales.shape[0] == 1:
        scales = scales.repeat_interleave(FP8_BLOCK, dim=1)[:, : rows_RK.shape[1]]
    return (rows_RK / scales).clamp_(-_FP8_MAX, _FP8_MAX).to(FP8)
