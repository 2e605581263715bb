"""RMSNorm as the trainer calls it: the raw forward and backward, and autograd functions made of them.

Owns validation and the choice by device (a CUDA tensor takes the kernel, any other the reference). Leaves the arithmetic to `triton` and
`reference`: fp32 inside, one rounding at the end. No function waits for the device.

T: rows, D: columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finery_kernels.errors import UnsupportedError
from finery_kernels.overlap import check_apart
from finery_kernels.rms_norm import reference
from finery_kernels.rms_norm.checks import as_rows, check_activation, check_like, check_parameter, check_vector, statistics_dtype


@torch.no_grad()
def rms_norm_forward(
    x_TD: Tensor,
    weight_D: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    residual_TD: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = s · rstd · (offset + weight) with rstd = 1/√(mean(s²) + eps), and s = x + residual, rounded to the dtype of x first.

    `x_TD` and `residual_TD` are [T, D] in bf16, fp16 or fp32 (off the GPU also fp64) with unit stride in the last dimension and any row
    stride of at least D; `weight_D` is [D]. Returns y [T, D], s [T, D] (`x_TD` itself without a residual) and rstd [T] in fp32. y and s
    are written to `out` and `residual_out` where given, which may be `x_TD` or `residual_TD` but not one another.

    Raises UnsupportedError, without having written anything. Source: https://arxiv.org/abs/1910.07467; offset 1 is Gemma's.
    """
    check_activation("x_TD", x_TD)
    check_parameter("weight_D", weight_D, x_TD)
    for name, tensor in (("residual_TD", residual_TD), ("out", out), ("residual_out", residual_out)):
        if tensor is not None:
            check_like(name, tensor, x_TD)
    if residual_out is not None and residual_TD is None:
        raise UnsupportedError("residual_out: given without residual_TD, wanted both or neither")
    check_apart("out", out, "residual_out", residual_out)
    if x_TD.is_cuda:
        from finery_kernels.rms_norm import triton

        forward = triton.rms_norm_forward
    else:
        forward = reference.rms_norm_forward
    return forward(x_TD, weight_D, eps=eps, offset=offset, residual_TD=residual_TD, out=out, residual_out=residual_out)


@torch.no_grad()
def rms_norm_backward(
    dy_TD: Tensor,
    s_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    *,
    offset: float = 0.0,
    dresidual_TD: Tensor | None = None,
    out: Tensor | None = None,
    dweight_D: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to s (hence to x and to the residual alike): that through y, plus `dresidual_TD`, rounded once.

    `dy_TD`, `s_TD` and `dresidual_TD` are [T, D] of one dtype; `s_TD` and `rstd_T` are what the forward returned. Returns dx [T, D],
    written to `out` where given, which may be any of these three. `dweight_D` is an fp32 buffer [D] that the weight's gradient is
    added to, in the same order in every run; without it that work is not done.

    Raises UnsupportedError, without having written anything.
    """
    check_activation("s_TD", s_TD)
    check_parameter("weight_D", weight_D, s_TD)
    check_vector("rstd_T", rstd_T, s_TD, length=s_TD.shape[0], dtype=statistics_dtype(s_TD))
    for name, tensor in (("dy_TD", dy_TD), ("dresidual_TD", dresidual_TD), ("out", out)):
        if tensor is not None:
            check_like(name, tensor, s_TD)
    if dweight_D is not None:
        check_vector("dweight_D", dweight_D, s_TD, length=s_TD.shape[1], dtype=statistics_dtype(s_TD))
    if s_TD.is_cuda:
        from finery_kernels.rms_norm import triton

        backward = triton.rms_norm_backward
    else:
        backward = reference.rms_norm_backward
    return backward(dy_TD, s_TD, weight_D, rstd_T, offset=offset, dresidual_TD=dresidual_TD, out=out, dweight_D=dweight_D)


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """RMSNorm over the last dimension of `x` [..., D], differentiable in `x` and `weight_D`; else as `rms_norm_forward`.

    A layout without rows (say, transposed) is copied first. Raises UnsupportedError.
    """
    y_TD: Tensor = _RMSNorm.apply(as_rows(x), weight_D, eps, offset)  # pyright: ignore[reportAssignmentType]
    return y_TD.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, *, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual) over [..., D], both differentiable in all tensors; else as `rms_norm`."""
    if x.shape != residual.shape:
        raise UnsupportedError(f"residual: shape {tuple(residual.shape)}, wanted that of x, {tuple(x.shape)}")
    outputs: tuple[Tensor, Tensor] = _AddRMSNorm.apply(as_rows(x), as_rows(residual), weight_D, eps, offset)  # pyright: ignore[reportAssignmentType]
    return outputs[0].view(x.shape), outputs[1].view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, offset: float) -> Tensor:
        y_TD, _, rstd_T = rms_norm_forward(x_TD, weight_D, eps=eps, offset=offset)
        ctx.save_for_backward(x_TD, weight_D, rstd_T)
        ctx.offset = offset
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy_TD: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        dx_TD, dweight_D = _gradients(ctx, dy_TD, None, wants_dweight=ctx.needs_input_grad[1])
        return dx_TD, dweight_D, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        y_TD, sum_TD, rstd_T = rms_norm_forward(x_TD, weight_D, eps=eps, offset=offset, residual_TD=residual_TD)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sum_TD, weight_D, rstd_T)
        ctx.offset = offset
        return y_TD, sum_TD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy_TD: Tensor | None, dsum_TD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if dy_TD is None:
            return dsum_TD, dsum_TD, None, None, None
        dx_TD, dweight_D = _gradients(ctx, dy_TD, dsum_TD, wants_dweight=ctx.needs_input_grad[2])
        return dx_TD, dx_TD, dweight_D, None, None


def _gradients(ctx: Any, dy_TD: Tensor, dsum_TD: Tensor | None, *, wants_dweight: bool) -> tuple[Tensor, Tensor | None]:
    s_TD, weight_D, rstd_T = ctx.saved_tensors
    dweight_D = torch.zeros_like(weight_D, dtype=statistics_dtype(s_TD)) if wants_dweight else None
    dsum_TD = None if dsum_TD is None else as_rows(dsum_TD)
    dx_TD = rms_norm_backward(as_rows(dy_TD), s_TD, weight_D, rstd_T, offset=ctx.offset, dresidual_TD=dsum_TD, dweight_D=dweight_D)
    return dx_TD, None if dweight_D is None else dweight_D.to(weight_D.dtype)
