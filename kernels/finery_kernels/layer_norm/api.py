"""LayerNorm as the trainer calls it: the raw forward and backward, and autograd functions made of them.

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
from finery_kernels.layer_norm import reference
from finery_kernels.overlap import check_apart
from finery_kernels.rms_norm.checks import as_rows, check_activation, check_like, check_parameter, check_vector, statistics_dtype


@torch.no_grad()
def layer_norm_forward(
    x_TD: Tensor,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    residual_TD: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = (s − mean(s)) · rstd · (offset + weight) + bias with rstd = 1/√(var(s) + eps), and s = x + residual, rounded to x's dtype first.

    `x_TD` and `residual_TD` are [T, D] in bf16, fp16 or fp32 (off the GPU also fp64) with unit stride in the last dimension and any row
    stride of at least D; `weight_D` and `bias_D` are [D], and either may be None (without a weight `offset` goes unused). Returns y
    [T, D], s [T, D] (`x_TD` itself without a residual), mean [T] and rstd [T] in fp32. y and s are written to `out` and `residual_out`
    where given, which may be `x_TD` or `residual_TD` but not one another.

    Raises UnsupportedError, without having written anything. Source: https://arxiv.org/abs/1607.06450; offset 1 is Nemotron's.
    """
    check_activation("x_TD", x_TD)
    for name, parameter in (("weight_D", weight_D), ("bias_D", bias_D)):
        if parameter is not None:
            check_parameter(name, parameter, x_TD)
    for name, tensor in (("residual_TD", residual_TD), ("out", out), ("residual_out", residual_out)):
        if tensor is not None:
            check_like(name, tensor, x_TD)
    if residual_out is not None and residual_TD is None:
        raise UnsupportedError("residual_out: given without residual_TD, wanted both or neither")
    check_apart("out", out, "residual_out", residual_out)
    if x_TD.is_cuda:
        from finery_kernels.layer_norm import triton

        forward = triton.layer_norm_forward
    else:
        forward = reference.layer_norm_forward
    return forward(x_TD, weight_D, bias_D, eps=eps, offset=offset, residual_TD=residual_TD, out=out, residual_out=residual_out)


@torch.no_grad()
def layer_norm_backward(
    dy_TD: Tensor,
    s_TD: Tensor,
    weight_D: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    *,
    offset: float = 0.0,
    dresidual_TD: Tensor | None = None,
    out: Tensor | None = None,
    dweight_D: Tensor | None = None,
    dbias_D: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to s (hence to x and to the residual alike): that through y, plus `dresidual_TD`, rounded once.

    `dy_TD`, `s_TD` and `dresidual_TD` are [T, D] of one dtype; `s_TD`, `mean_T` and `rstd_T` are what the forward returned. Returns dx
    [T, D], written to `out` where given, which may be any of these three. `dweight_D` and `dbias_D` are fp32 buffers [D] that the
    parameters' gradients are added to, in the same order in every run; without them that work is not done.

    Raises UnsupportedError, without having written anything.
    """
    check_activation("s_TD", s_TD)
    if weight_D is not None:
        check_parameter("weight_D", weight_D, s_TD)
    for name, tensor in (("mean_T", mean_T), ("rstd_T", rstd_T)):
        check_vector(name, tensor, s_TD, length=s_TD.shape[0], dtype=statistics_dtype(s_TD))
    for name, tensor in (("dy_TD", dy_TD), ("dresidual_TD", dresidual_TD), ("out", out)):
        if tensor is not None:
            check_like(name, tensor, s_TD)
    for name, tensor in (("dweight_D", dweight_D), ("dbias_D", dbias_D)):
        if tensor is not None:
            check_vector(name, tensor, s_TD, length=s_TD.shape[1], dtype=statistics_dtype(s_TD))
    if s_TD.is_cuda:
        from finery_kernels.layer_norm import triton

        backward = triton.layer_norm_backward
    else:
        backward = reference.layer_norm_backward
    saved = (s_TD, weight_D, mean_T, rstd_T)
    return backward(dy_TD, *saved, offset=offset, dresidual_TD=dresidual_TD, out=out, dweight_D=dweight_D, dbias_D=dbias_D)


def layer_norm(x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, *, eps: float, offset: float = 0.0) -> Tensor:
    """LayerNorm over the last dimension of `x` [..., D], differentiable in all tensors; else as `layer_norm_forward`.

    A layout without rows (say, transposed) is copied first. Raises UnsupportedError.
    """
    y_TD: Tensor = _LayerNorm.apply(as_rows(x), weight_D, bias_D, eps, offset)  # pyright: ignore[reportAssignmentType]
    return y_TD.view(x.shape)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, *, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(LayerNorm of x + residual, x + residual) over [..., D], both differentiable in all tensors; else as `layer_norm`."""
    if x.shape != residual.shape:
        raise UnsupportedError(f"residual: shape {tuple(residual.shape)}, wanted that of x, {tuple(x.shape)}")
    rows = as_rows(x), as_rows(residual)
    outputs: tuple[Tensor, Tensor] = _AddLayerNorm.apply(*rows, weight_D, bias_D, eps, offset)  # pyright: ignore[reportAssignmentType]
    return outputs[0].view(x.shape), outputs[1].view(x.shape)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, offset: float) -> Tensor:
        y_TD, _, mean_T, rstd_T = layer_norm_forward(x_TD, weight_D, bias_D, eps=eps, offset=offset)
        ctx.save_for_backward(x_TD, weight_D, bias_D, mean_T, rstd_T)
        ctx.offset = offset
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy_TD: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        return *_gradients(ctx, dy_TD, None, wanted=ctx.needs_input_grad[1:3]), None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        y_TD, sum_TD, mean_T, rstd_T = layer_norm_forward(x_TD, weight_D, bias_D, eps=eps, offset=offset, residual_TD=residual_TD)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sum_TD, weight_D, bias_D, mean_T, rstd_T)
        ctx.offset = offset
        return y_TD, sum_TD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy_TD: Tensor | None, dsum_TD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        if dy_TD is None:
            return dsum_TD, dsum_TD, None, None, None, None
        dx_TD, dweight_D, dbias_D = _gradients(ctx, dy_TD, dsum_TD, wanted=ctx.needs_input_grad[2:4])
        return dx_TD, dx_TD, dweight_D, dbias_D, None, None


def _gradients(
    ctx: Any, dy_TD: Tensor, dsum_TD: Tensor | None, *, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    s_TD, weight_D, bias_D, mean_T, rstd_T = ctx.saved_tensors
    statistics = statistics_dtype(s_TD)
    dweight_D = torch.zeros_like(weight_D, dtype=statistics) if wanted[0] else None
    dbias_D = torch.zeros_like(bias_D, dtype=statistics) if wanted[1] else None
    dsum_TD = None if dsum_TD is None else as_rows(dsum_TD)
    saved = (s_TD, weight_D, mean_T, rstd_T)
    dx_TD = layer_norm_backward(as_rows(dy_TD), *saved, offset=ctx.offset, dresidual_TD=dsum_TD, dweight_D=dweight_D, dbias_D=dbias_D)
    dweight_D = None if dweight_D is None else dweight_D.to(weight_D.dtype)
    return dx_TD, dweight_D, None if dbias_D is None else dbias_D.to(bias_D.dtype)
