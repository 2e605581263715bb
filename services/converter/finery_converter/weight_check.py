"""Every number of a merged model against the one that it has to be.

Owns what "rounded to the nearest" allows: half a unit in the last place of the type, and float32's error on the way to it. Leaves what the
number has to be to `changes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from finery_converter.weights import Weights

_ARITHMETIC = 2.0**-20
"""Share of a row's largest magnitude that sums of products in float32 may differ by, whatever their order."""


@dataclass(frozen=True)
class WeightCheck:
    """Merged numbers against W + scale * B A."""

    num_weights: int
    num_rounded_otherwise: int
    """Not the nearest number of the type, but within float32's error of being it."""
    num_wrong: int
    wrong_tensors: tuple[str, ...]
    """By name, also those that only one of the two has."""


def check_weights(
    exact: Weights, merged: Weights, *, dtype: torch.dtype, on_progress: Callable[[float], None] | None = None
) -> WeightCheck:
    """Compares `merged`, tensors of `dtype`, with `exact`, the same before rounding; reads both once.

    Tensors of whole numbers have to be equal, and both to have the same names and shapes.
    """
    total = max(1, sum(math.prod(shape) for shape in exact.shapes.values()))
    seen = num_otherwise = num_wrong = 0
    wrong_tensors = set(exact.shapes) ^ set(merged.shapes)
    for name in sorted(set(exact.shapes) & set(merged.shapes)):
        otherwise, wrong = _compare(name, exact, merged, dtype=dtype)
        num_otherwise, num_wrong = num_otherwise + otherwise, num_wrong + wrong
        if wrong:
            wrong_tensors.add(name)
        seen += math.prod(exact.shapes[name])
        if on_progress:
            on_progress(seen / total)
    return WeightCheck(seen, num_otherwise, num_wrong, tuple(sorted(wrong_tensors)))


def _compare(name: str, exact: Weights, merged: Weights, *, dtype: torch.dtype) -> tuple[int, int]:
    """(number rounded otherwise, number wrong)"""
    if tuple(exact.shapes[name]) != tuple(merged.shapes[name]):
        return 0, math.prod(exact.shapes[name])
    num_otherwise = num_wrong = 0
    for wanted, got in _aligned(exact.blocks(name), merged.blocks(name)):
        nearest = wanted.to(dtype).to(torch.float32) if wanted.is_floating_point() else wanted
        differs = got != nearest
        num_differing = int(differs.sum())
        if not num_differing:
            continue
        if not wanted.is_floating_point():
            num_wrong += num_differing
            continue
        slack = wanted.abs().amax(1, keepdim=True).expand_as(wanted)[differs] * _ARITHMETIC
        distance = (got[differs] - wanted[differs]).abs()
        # Not `distance > …`, which is false for NaN.
        wrong = int((~(distance <= half_unit(wanted[differs], dtype=dtype) + slack)).sum())
        num_wrong, num_otherwise = num_wrong + wrong, num_otherwise + num_differing - wrong
    return num_otherwise, num_wrong


def half_unit(values: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbours of `dtype` around `values`, float32."""
    info = torch.finfo(dtype)
    unit = torch.ldexp(torch.full_like(values, info.eps), torch.frexp(values).exponent - 1)
    return unit.clamp(min=info.tiny * info.eps) / 2


def _aligned(left: Iterator[torch.Tensor], right: Iterator[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two tensors' blocks of rows, cut where either is: as many rows on both sides."""
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        rows = min(len(a), len(b))
        yield a[:rows], b[:rows]
        a = a[rows:] if rows < len(a) else next(left, None)
        b = b[rows:] if rows < len(b) else next(right, None)
