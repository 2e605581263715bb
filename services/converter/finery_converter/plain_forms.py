"""What a plain conversion makes of exact weights: each form's rounding and back, on a whole tensor, without a file.

Owns the few lines that say what NF4 and FP8 hold, as a yardstick for what was written in blocks by several threads. Leaves
NF4's codes to `nf4`, which is held to bitsandbytes bit by bit.

Letters: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from functools import partial

import torch

from finery_converter import nf4
from finery_converter.tensorfiles import rows_and_columns
from finery_converter.weights import Weights, read

_FP8 = torch.float8_e4m3fn
_FP8_BLOCK = 128
_CHUNK_ELEMENTS = 128 * 1024

Form = Callable[[torch.Tensor], torch.Tensor]
"""float32 (O, I), which it may change, to what is read back of it."""


class RoundedWeights:
    """`weights` rounded once to `dtype`, those named in `quantized` by `form` instead, and read back in float32.

    Holds one tensor that is quantized at a time.
    """

    def __init__(self, weights: Weights, *, dtype: torch.dtype, quantized: Set[str] = frozenset(), form: Form | None = None) -> None:
        assert form is not None or not quantized
        self._weights = weights
        self._dtype = dtype
        self._quantized = quantized
        self._form = form
        self.shapes = weights.shapes

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        if self._form is None or name not in self._quantized:
            return (self._rounded(block) for block in self._weights.blocks(name))
        return iter([self._form(read(self._weights, name)).reshape(rows_and_columns(self.shapes[name]))])

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        if name in self._quantized:
            return torch.cat(list(self.blocks(name)))[indices]
        return self._rounded(self._weights.rows(name, indices))

    def _rounded(self, block: torch.Tensor) -> torch.Tensor:
        return block.to(self._dtype).to(torch.float32) if block.is_floating_point() else block


def form_of(type_: str, *, dtype: torch.dtype) -> Form | None:
    """The form of a type's quantized weights (`dtype` is that of all others); None where it quantizes none."""
    forms: dict[str, Form] = {"nf4": partial(plain_nf4, dtype=dtype), "fp8": plain_fp8, "fp8_block": plain_fp8_block}
    return forms.get(type_)


def plain_nf4(weight_OI: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """In blocks of 64, scales quantized as well, dequantized to `dtype`."""
    flat = weight_OI.reshape(-1)
    absmax_B = nf4.block_absmax(flat)
    kept_B = nf4.nest(absmax_B, arithmetic="gpu").scales()
    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        chunk = flat[start : start + _CHUNK_ELEMENTS]
        blocks = slice(start // nf4.BLOCK, -(-(start + chunk.numel()) // nf4.BLOCK))
        packed = nf4.pack(nf4.codes(chunk, absmax_B[blocks], arithmetic="gpu"))
        chunk.copy_(nf4.dequantized(packed, kept_B[blocks], num_elements=chunk.numel(), dtype=dtype))
    return flat.view(weight_OI.shape)


def plain_fp8(weight_OI: torch.Tensor) -> torch.Tensor:
    """A scale for each row."""
    return _fp8(weight_OI, weight_OI.abs().amax(1, keepdim=True))


def plain_fp8_block(weight_OI: torch.Tensor) -> torch.Tensor:
    """A scale for each 128 x 128."""
    peaks = torch.nn.functional.max_pool2d(weight_OI.abs().unsqueeze(0), _FP8_BLOCK, ceil_mode=True)[0]
    of_rows = peaks.repeat_interleave(_FP8_BLOCK, 0)[: len(weight_OI)]
    return _fp8(weight_OI, of_rows.repeat_interleave(_FP8_BLOCK, 1)[:, : weight_OI.shape[1]])


def _fp8(weight_OI: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """Scales are peaks by the type's largest number, rounded up to bfloat16."""
    wanted = peaks / torch.finfo(_FP8).max
    scales = wanted.to(torch.bfloat16)
    above = torch.nextafter(scales, torch.full_like(scales, torch.inf))
    scales = torch.where(scales.float() < wanted, above, scales).float()
    scales = torch.where(peaks > 0, scales, torch.ones_like(scales))
    return (weight_OI / scales).to(_FP8).float() * scales
