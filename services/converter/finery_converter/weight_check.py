"""Every number of a converted model against the one that it has to be.

Owns what "rounded to the nearest" allows: half a unit in the last place of the type, and float32's error on the way to it. Quantized
weights, whose step depends on their neighbours, are compared with the plain quantization: nearly all are the same, none is further off.
Leaves what a number has to be to `changes` and `plain_forms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

import torch

from finery_converter.weights import Weights

_ARITHMETIC = 2.0**-20
"""Share of a row's largest magnitude that sums of products in float32 may differ by, whatever their order."""


_UNEQUAL_SHARE = 1e-3
"""Of a quantized tensor's numbers that may fall to the other side of a near tie."""


@dataclass(frozen=True)
class WeightCheck:
    """Converted numbers against W + scale * B A in the converted type."""

    num_weights: int
    num_rounded_otherwise: int
    """Not what the plain conversion has, but as near as float32's error makes it."""
    num_wrong: int
    wrong_tensors: tuple[str, ...]
    """By name, also those that only one of the two has."""


def check_weights(
    exact: Weights,
    converted: Weights,
    *,
    plain: Weights,
    dtype: torch.dtype,
    quantized: Set[str] = frozenset(),
    on_progress: Callable[[float], None] | None = None,
) -> WeightCheck:
    """Compares `converted` with `exact`, the same before rounding; reads both once, and twice what is `quantized`.

    `plain` is asked for those, rounded plainly; all other floating-point tensors are of `dtype`. Whole numbers have to be equal, names and
    shapes the same.
    """
    total = max(1, sum(math.prod(shape) for shape in exact.shapes.values()))
    seen = num_otherwise = num_wrong = 0
    wrong_tensors = set(exact.shapes) ^ set(converted.shapes)
    for name in sorted(set(exact.shapes) & set(converted.shapes)):
        otherwise, wrong = _compare(name, exact, converted, plain=plain, dtype=None if name in quantized else dtype)
        num_otherwise, num_wrong = num_otherwise + otherwise, num_wrong + wrong
        if wrong:
            wrong_tensors.add(name)
        seen += math.prod(exact.shapes[name])
        if on_progress:
            on_progress(seen / total)
    return WeightCheck(seen, num_otherwise, num_wrong, tuple(sorted(wrong_tensors)))


def _compare(name: str, exact: Weights, converted: Weights, *, plain: Weights, dtype: torch.dtype | None) -> tuple[int, int]:
    """(number rounded otherwise, number wrong); `dtype` None for a quantized tensor."""
    num_numbers = math.prod(exact.shapes[name])
    if tuple(exact.shapes[name]) != tuple(converted.shapes[name]):
        return 0, num_numbers
    num_otherwise = num_wrong = 0
    for wanted, nearest, got in _triples(name, exact, converted, plain=plain, dtype=dtype):
        differs = got != nearest
        num_differing = int(differs.sum())
        if not num_differing:
            continue
        wrong = num_differing if not wanted.is_floating_point() else _num_wrong(wanted, nearest, got, differs, dtype=dtype)
        num_wrong, num_otherwise = num_wrong + wrong, num_otherwise + num_differing - wrong
    if dtype is None and num_otherwise > _UNEQUAL_SHARE * num_numbers:
        return 0, num_otherwise + num_wrong
    return num_otherwise, num_wrong


def _triples(
    name: str, exact: Weights, converted: Weights, *, plain: Weights, dtype: torch.dtype | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Blocks of rows: exact, rounded, as converted."""
    if dtype is None:
        for wanted, nearest, got in _aligned(exact.blocks(name), plain.blocks(name), converted.blocks(name)):
            yield wanted, nearest, got
        return
    for wanted, got in _aligned(exact.blocks(name), converted.blocks(name)):
        yield wanted, wanted.to(dtype).to(torch.float32) if wanted.is_floating_point() else wanted, got


def _num_wrong(wanted: torch.Tensor, nearest: torch.Tensor, got: torch.Tensor, differs: torch.Tensor, *, dtype: torch.dtype | None) -> int:
    """Of the numbers that differ, how many are further from the exact ones than the type makes them."""
    slack = wanted.abs().amax(1, keepdim=True).expand_as(wanted)[differs] * _ARITHMETIC
    if dtype is None:
        allowed = (nearest - wanted).abs().amax(1, keepdim=True).expand_as(wanted)[differs]
    else:
        allowed = half_unit(wanted[differs], dtype=dtype)
    # Not `distance > …`, which is false for NaN.
    return int((~((got[differs] - wanted[differs]).abs() <= allowed + slack)).sum())


def half_unit(values: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbours of `dtype` around `values`, float32."""
    info = torch.finfo(dtype)
    unit = torch.ldexp(torch.full_like(values, info.eps), torch.frexp(values).exponent - 1)
    return unit.clamp(min=info.tiny * info.eps) / 2


def _aligned(*tensors: Iterator[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors' blocks of rows, cut where any of them is: as many rows of each."""
    heads = [next(tensor, None) for tensor in tensors]
    while present := [head for head in heads if head is not None]:
        assert len(present) == len(tensors), "tensors of one shape have as many rows"
        rows = min(map(len, present))
        yield [head[:rows] for head in present]
        heads = [head[rows:] if rows < len(head) else next(tensor, None) for head, tensor in zip(present, tensors, strict=True)]
