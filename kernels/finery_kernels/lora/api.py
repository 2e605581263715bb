"""LoRA projections that share an input (q/k/v, or gate/up, or one alone), with the adapter inside the base weight's GEMM.

The members' weights stand below each other in one buffer that their adapters extend on both sides:

    weight_ext [N + R, K + R] = [ W        s·B ]      N, R: outputs and (padded) ranks of all members together, K: inputs
                                [ A         ·  ]      s·B is block-diagonal: a member's rows have its own ranks' columns only

An input with R spare columns then needs two GEMMs for all members: `x·Aᵀ` into the spare columns, and `[x, x·Aᵀ]·[W, s·B]ᵀ`. Backward, in
the same form, `dy·(s·B)` goes into the spare columns of dy, and dx = `[dy, dy·s·B]·[W; A]`. The sums over inputs and ranks are one
accumulation in fp32, where the plain form rounds the update and the output separately; nothing else differs. GEMMs are cuBLAS's.

In every function that takes a layout, tensors that do not fit it or each other raise UnsupportedError. Nothing waits for the device.

Owns the layout and the arithmetic; which buffers are reused, kept or made anew is the caller's. LoRA: arXiv:2106.09685.

Shapes: T rows, K inputs, N outputs of all members, R ranks of all members padded to a multiple of 8, r one member's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from finery_kernels.errors import UnsupportedError

_RANK_ALIGNMENT = 8  # 16 bytes of a 16-bit type: what cuBLAS asks of leading dimensions


class Adapter(NamedTuple):
    """One member's LoRA factors: A [r, K], B [N, r], and the factor of their product."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class StackedLayout:
    """Where the members of a projection stand. `ranks` has 0 for a member without adapter."""

    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]

    @cached_property
    def num_outputs(self) -> int:
        """N."""
        return sum(self.out_features)

    @cached_property
    def num_ranks(self) -> int:
        """R: all ranks, padded to a multiple of 8."""
        return -(-sum(self.ranks) // _RANK_ALIGNMENT) * _RANK_ALIGNMENT

    @cached_property
    def row_starts(self) -> tuple[int, ...]:
        """First output of each member."""
        return tuple(accumulate(self.out_features, initial=0))[:-1]

    @cached_property
    def rank_starts(self) -> tuple[int, ...]:
        """First rank of each member."""
        return tuple(accumulate(self.ranks, initial=0))[:-1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of weight_ext."""
        return self.num_outputs + self.num_ranks, self.in_features + self.num_ranks

    def rows(self, member: int) -> slice:
        """The outputs of `member`."""
        return slice(self.row_starts[member], self.row_starts[member] + self.out_features[member])

    def rank_range(self, member: int) -> slice:
        """The ranks of `member`."""
        return slice(self.rank_starts[member], self.rank_starts[member] + self.ranks[member])


def pack_adapters_(weight_ext: torch.Tensor, layout: StackedLayout, adapters: Sequence[Adapter | None]) -> None:
    """Writes A and s·B of every adapter into `weight_ext`, rounded once to its dtype. What no adapter owns must have been zeroed before."""
    _check_operand("weight_ext", weight_ext, layout.shape, like=weight_ext)
    _check_adapters("adapters", adapters, layout, like=weight_ext)
    num_outputs, num_inputs = layout.num_outputs, layout.in_features
    for member, adapter in enumerate(adapters):
        if adapter is None:
            continue
        ranks = layout.rank_range(member)
        weight_ext[num_outputs + ranks.start : num_outputs + ranks.stop, :num_inputs].copy_(adapter.a)
        block = weight_ext[layout.rows(member), num_inputs + ranks.start : num_inputs + ranks.stop]
        block.copy_(adapter.b if adapter.scaling == 1.0 else adapter.b * adapter.scaling)


def lora_down(x_TK: torch.Tensor, weight_ext: torch.Tensor, layout: StackedLayout, *, out: torch.Tensor) -> None:
    """`x·Aᵀ` of all members into `out` [T, R]."""
    _check_rows("x_TK", x_TK, layout.in_features)
    _check_operand("weight_ext", weight_ext, layout.shape, like=x_TK)
    _check_operand("out", out, (x_TK.shape[0], layout.num_ranks), like=x_TK)
    _clear_spare(out)
    torch.mm(x_TK, weight_ext[layout.num_outputs :, : layout.in_features].T, out=out)


def lora_forward(
    x_ext: torch.Tensor,
    weight_ext: torch.Tensor,
    layout: StackedLayout,
    *,
    bias_N: torch.Tensor | None = None,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`scale * ([x, x·Aᵀ] @ [W, s·B]ᵀ + bias)` [T, N], for `x_ext` [T, K + R] whose spare columns `lora_down` has filled."""
    _check_rows("x_ext", x_ext, layout.shape[1])
    _check_operand("weight_ext", weight_ext, layout.shape, like=x_ext)
    if bias_N is not None:
        _check_operand("bias_N", bias_N, (layout.num_outputs,), like=x_ext, has_any_dtype=True)
    if out is None:
        out = x_ext.new_empty(x_ext.shape[0], layout.num_outputs)
    else:
        _check_operand("out", out, (x_ext.shape[0], layout.num_outputs), like=x_ext)
    weight = weight_ext[: layout.num_outputs]
    if scale == 1.0:
        torch.mm(x_ext, weight.T, out=out)
    else:
        torch.addmm(out, x_ext, weight.T, beta=0, alpha=scale, out=out)
    if bias_N is not None:
        out.add_(bias_N, alpha=scale)
    return out


def lora_backward_input(
    dy_ext: torch.Tensor, weight_ext: torch.Tensor, layout: StackedLayout, *, scale: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """dx [T, K] of `lora_forward` and of `lora_down` together; `dy_ext` [T, N + R] gets `dy·(s·B)` in its spare columns on the way."""
    num_outputs, num_inputs = layout.num_outputs, layout.in_features
    _check_rows("dy_ext", dy_ext, layout.shape[0])
    _check_operand("weight_ext", weight_ext, layout.shape, like=dy_ext)
    if out is not None:
        _check_operand("out", out, (dy_ext.shape[0], num_inputs), like=dy_ext)
    if layout.num_ranks:
        _clear_spare(dy_ext[:, num_outputs:])
        torch.mm(dy_ext[:, :num_outputs], weight_ext[:num_outputs, num_inputs:], out=dy_ext[:, num_outputs:])
    if out is None:
        out = dy_ext.new_empty(dy_ext.shape[0], num_inputs)
    weight = weight_ext[:, :num_inputs]
    if scale == 1.0:
        torch.mm(dy_ext, weight, out=out)
    else:
        torch.addmm(out, dy_ext, weight, beta=0, alpha=scale, out=out)
    return out


def _clear_spare(spare_TR: torch.Tensor) -> None:
    """Zeros, off the GPU, in columns that a product is about to fill beside its own operand.

    oneDNN's bf16 product (AMX, torch 2.13) reads an operand's rows on to the next multiple of 32 and multiplies what lies there by zero.
    What was never written may be NaN, and so would the product be.
    """
    if not spare_TR.is_cuda:
        spare_TR.zero_()


def lora_backward_adapters(
    dy_ext: torch.Tensor,
    x_TK: torch.Tensor,
    xa_TR: torch.Tensor,
    layout: StackedLayout,
    grads: Sequence[Adapter | None],
    *,
    scale: float = 1.0,
) -> None:
    """Adds dA [r, K] and dB [N, r] to the buffers in `grads`, in fp32.

    `lora_backward_input` has filled the spare columns of `dy_ext` [T, N + R], which may have more columns behind them.
    """
    _check_rows("dy_ext", dy_ext, layout.shape[0], may_be_wider=True)
    _check_operand("x_TK", x_TK, (dy_ext.shape[0], layout.in_features), like=dy_ext)
    _check_operand("xa_TR", xa_TR, (dy_ext.shape[0], layout.num_ranks), like=dy_ext)
    _check_adapters("grads", grads, layout, like=dy_ext)
    for member, grad in enumerate(grads):
        if grad is None:
            continue
        ranks = layout.rank_range(member)
        dyb_Tr = dy_ext[:, layout.num_outputs + ranks.start : layout.num_outputs + ranks.stop]
        accumulate_(grad.a, dyb_Tr.T, x_TK, alpha=scale)
        accumulate_(grad.b, dy_ext[:, layout.rows(member)].T, xa_TR[:, ranks], alpha=scale * grad.scaling)


def accumulate_(total_MN: torch.Tensor, a_MT: torch.Tensor, b_TN: torch.Tensor, *, alpha: float = 1.0) -> None:
    """`total += alpha * a @ b`, summed in fp32 whatever the dtype of the factors."""
    if total_MN.dtype == a_MT.dtype:
        total_MN.addmm_(a_MT, b_TN, alpha=alpha)
    elif a_MT.is_cuda:
        torch.addmm(total_MN, a_MT, b_TN, out_dtype=total_MN.dtype, alpha=alpha, out=total_MN)
    else:
        total_MN.addmm_(a_MT.to(total_MN.dtype), b_TN.to(total_MN.dtype), alpha=alpha)


def lora_projection(
    x_TK: torch.Tensor,
    weights_NK: Sequence[torch.Tensor],
    adapters: Sequence[Adapter | None],
    biases_N: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """All members' `x @ W.T + bias + scaling * (x @ A.T) @ B.T` side by side [T, N], as one autograd node.

    Gradients go to x, to every A and every B (in their own dtypes); base weights and biases are frozen.
    Raises UnsupportedError for operands whose shapes, dtypes or devices do not fit.
    """
    biases_N = [None] * len(weights_NK) if biases_N is None else biases_N
    layout = _checked_layout(x_TK, weights_NK, adapters, biases_N)
    factors = [factor for adapter in adapters if adapter is not None for factor in (adapter.a, adapter.b)]
    scalings = [None if adapter is None else adapter.scaling for adapter in adapters]
    return _LoraProjection.apply(x_TK, layout, list(weights_NK), list(biases_N), scalings, *factors)  # pyright: ignore[reportReturnType]


class _LoraProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        layout: StackedLayout,
        weights_NK: list[torch.Tensor],
        biases_N: list[torch.Tensor | None],
        scalings: list[float | None],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        weight_ext = x_TK.new_zeros(layout.shape)
        for member, weight_NK in enumerate(weights_NK):
            weight_ext[layout.rows(member), : layout.in_features] = weight_NK
        pack_adapters_(weight_ext, layout, _paired(factors, scalings))
        x_ext = x_TK.new_empty(x_TK.shape[0], weight_ext.shape[1])
        x_ext[:, : layout.in_features] = x_TK
        lora_down(x_TK, weight_ext, layout, out=x_ext[:, layout.in_features :])
        y_TN = lora_forward(x_ext, weight_ext, layout)
        for member, bias_N in enumerate(biases_N):
            if bias_N is not None:
                y_TN[:, layout.rows(member)] += bias_N
        ctx.save_for_backward(x_ext, weight_ext, *factors)
        ctx.layout, ctx.scalings = layout, scalings
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy_TN: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x_ext, weight_ext, *factors = ctx.saved_tensors
        layout = ctx.layout
        dy_ext = dy_TN.new_empty(dy_TN.shape[0], weight_ext.shape[0])
        dy_ext[:, : layout.num_outputs] = dy_TN
        dx_TK = lora_backward_input(dy_ext, weight_ext, layout)
        totals = [torch.zeros_like(factor, dtype=None if factor.dtype == torch.float64 else torch.float32) for factor in factors]
        num_inputs = layout.in_features
        lora_backward_adapters(dy_ext, x_ext[:, :num_inputs], x_ext[:, num_inputs:], layout, _paired(totals, ctx.scalings))
        return dx_TK, None, None, None, None, *(total.to(factor.dtype) for total, factor in zip(totals, factors, strict=True))


def _paired(factors: Sequence[torch.Tensor], scalings: Sequence[float | None]) -> list[Adapter | None]:
    remaining = iter(factors)
    return [None if scaling is None else Adapter(next(remaining), next(remaining), scaling) for scaling in scalings]


def _checked_layout(
    x_TK: torch.Tensor,
    weights_NK: Sequence[torch.Tensor],
    adapters: Sequence[Adapter | None],
    biases_N: Sequence[torch.Tensor | None],
) -> StackedLayout:
    if not len(weights_NK) == len(adapters) == len(biases_N) or not weights_NK:
        raise UnsupportedError(
            f"weights, adapters, biases: got {len(weights_NK)}, {len(adapters)} and {len(biases_N)}, wanted one of each for every member."
        )
    if x_TK.dim() != 2 or not x_TK.is_floating_point():
        raise UnsupportedError(f"x: got {x_TK.dtype} of {x_TK.dim()} dimensions, wanted 2, [rows, inputs], of floating point.")
    for member, (weight, adapter) in enumerate(zip(weights_NK, adapters, strict=True)):
        _check_matrix(f"weights[{member}]", weight)
        if adapter is not None:
            _check_matrix(f"adapters[{member}].a", adapter.a)
    ranks = tuple(0 if adapter is None else adapter.a.shape[0] for adapter in adapters)
    layout = StackedLayout(x_TK.shape[1], tuple(weight.shape[0] for weight in weights_NK), ranks)
    for member, (num_outputs, weight, bias) in enumerate(zip(layout.out_features, weights_NK, biases_N, strict=True)):
        _check_operand(f"weights[{member}]", weight, (num_outputs, layout.in_features), like=x_TK)
        if bias is not None:
            _check_operand(f"biases[{member}]", bias, (num_outputs,), like=x_TK)
    _check_adapters("adapters", adapters, layout, like=x_TK)
    return layout


def _check_matrix(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() != 2:
        raise UnsupportedError(f"{name}: got shape {tuple(tensor.shape)}, wanted two dimensions.")


def _check_rows(name: str, x: torch.Tensor, num_columns: int, *, may_be_wider: bool = False) -> None:
    _check_matrix(name, x)
    if x.shape[1] < num_columns or (x.shape[1] > num_columns and not may_be_wider):
        wanted = f"{num_columns} columns{' or more' if may_be_wider else ''}"
        raise UnsupportedError(f"{name}: got shape {tuple(x.shape)}, wanted {wanted}.")


def _check_adapters(name: str, adapters: Sequence[Adapter | None], layout: StackedLayout, *, like: torch.Tensor) -> None:
    if len(adapters) != len(layout.ranks):
        raise UnsupportedError(f"{name}: got {len(adapters)}, wanted {len(layout.ranks)}, one or None for every member.")
    for member, (adapter, num_outputs, rank) in enumerate(zip(adapters, layout.out_features, layout.ranks, strict=True)):
        if adapter is not None:
            _check_operand(f"{name}[{member}].a", adapter.a, (rank, layout.in_features), like=like, has_any_dtype=True)
            _check_operand(f"{name}[{member}].b", adapter.b, (num_outputs, rank), like=like, has_any_dtype=True)


def _check_operand(name: str, tensor: torch.Tensor, shape: tuple[int, ...], *, like: torch.Tensor, has_any_dtype: bool = False) -> None:
    """The device and, unless any floating one will do, the dtype are those of `like`."""
    if tensor.shape != shape:
        raise UnsupportedError(f"{name}: got shape {tuple(tensor.shape)}, wanted {shape}.")
    if tensor.device != like.device or not (tensor.is_floating_point() if has_any_dtype else tensor.dtype == like.dtype):
        wanted = "a floating dtype" if has_any_dtype else like.dtype
        raise UnsupportedError(f"{name}: got {tensor.dtype} on {tensor.device}, wanted {wanted} on {like.device}.")
