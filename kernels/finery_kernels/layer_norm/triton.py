# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""LayerNorm's kernels: one pass over memory each, one row per program in registers, fp32 inside, the variance from centred values.

Owns the kernels and their launches. Leaves validation to `api`, whose docstrings say what the functions promise, and how many warps and
programs a row width takes to RMSNorm, as the sum over programs of the parameters' gradients.

T: rows, D: columns, P: programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finery_kernels.rms_norm.triton import add_partial_sums, persistent_programs, pipeline_stages, row_options


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    y_stride,
    sum_stride,
    eps,
    offset,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y of the program's row; s = x + residual is rounded and stored first, where there is a residual."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    s = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * sum_stride + columns, rounded, mask=inside)
        s = rounded.to(tl.float32)
    mean = tl.div_rn(tl.sum(s, axis=0), D * 1.0)  # rounded once where the sum is exact
    centred = tl.where(inside, s - mean, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, axis=0) * (1.0 / D) + eps))
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    y = centred * rstd
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        y *= weight + offset
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(y_ptr + row * y_stride + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr,
    s_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    dy_stride,
    s_stride,
    dresidual_stride,
    dx_stride,
    offset,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of the program's row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    scaled = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + row * s_stride + columns, mask=inside, other=0.0).to(tl.float32)
    # Before the reductions, whose barriers no load is moved across.
    dresidual = tl.zeros((BLOCK,), dtype=tl.float32)
    if dresidual_ptr is not None:
        dresidual = tl.load(dresidual_ptr + row * dresidual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scaled *= tl.load(weight_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32) + offset
    rstd = tl.load(rstd_ptr + row)
    normalised = (s - tl.load(mean_ptr + row)) * rstd
    mean = tl.sum(scaled, axis=0) * (1.0 / D)
    projection = tl.sum(scaled * normalised, axis=0) * (1.0 / D)
    dx = (scaled - mean - normalised * projection) * rstd + dresidual
    tl.store(dx_ptr + row * dx_stride + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def backward_parameters_kernel(
    dy_ptr,
    s_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dy_stride,
    s_stride,
    dresidual_stride,
    dx_stride,
    num_rows,
    offset,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of rows p, p + P, …; their sums for weight and bias are row p of `dweight_ptr` and `dbias_ptr` [P, D], either may miss."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    weight = tl.zeros((BLOCK,), dtype=tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in tl.range(program, num_rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + row * s_stride + columns, mask=inside, other=0.0).to(tl.float32)
        dresidual = tl.zeros((BLOCK,), dtype=tl.float32)
        if dresidual_ptr is not None:
            dresidual = tl.load(dresidual_ptr + row * dresidual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normalised = (s - tl.load(mean_ptr + row)) * rstd
        if dweight_ptr is not None:
            dweight += dy * normalised
        if dbias_ptr is not None:
            dbias += dy
        scaled = dy
        if weight_ptr is not None:
            scaled *= weight
        mean = tl.sum(scaled, axis=0) * (1.0 / D)
        projection = tl.sum(scaled * normalised, axis=0) * (1.0 / D)
        dx = (scaled - mean - normalised * projection) * rstd + dresidual
        tl.store(dx_ptr + row * dx_stride + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program.to(tl.int64) * D + columns, dweight, mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program.to(tl.int64) * D + columns, dbias, mask=inside)


def layer_norm_forward(
    x_TD: Tensor,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    *,
    eps: float,
    offset: float,
    residual_TD: Tensor | None,
    out: Tensor | None,
    residual_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y [T, D], s [T, D] (`x_TD` itself without a residual), mean [T] and rstd [T], as `api.layer_norm_forward` says."""
    num_rows, num_columns = x_TD.shape
    y_TD = _empty_rows(x_TD) if out is None else out
    sum_TD = x_TD
    if residual_TD is not None:
        sum_TD = _empty_rows(x_TD) if residual_out is None else residual_out
    mean_T = torch.empty(num_rows, dtype=torch.float32, device=x_TD.device)
    rstd_T = torch.empty_like(mean_T)
    if num_rows == 0:
        return y_TD, sum_TD, mean_T, rstd_T
    block = triton.next_power_of_2(num_columns)
    tensors = (x_TD, residual_TD, weight_D, bias_D, y_TD, sum_TD, mean_T, rstd_T)
    strides = (x_TD.stride(0), 0 if residual_TD is None else residual_TD.stride(0), y_TD.stride(0), sum_TD.stride(0))
    with torch.cuda.device_of(x_TD):
        forward_kernel[(num_rows,)](*tensors, *strides, eps, offset, num_columns, block, **row_options(block))
    return y_TD, sum_TD, mean_T, rstd_T


def layer_norm_backward(
    dy_TD: Tensor,
    s_TD: Tensor,
    weight_D: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    *,
    offset: float,
    dresidual_TD: Tensor | None,
    out: Tensor | None,
    dweight_D: Tensor | None,
    dbias_D: Tensor | None,
) -> Tensor:
    """Returns dx [T, D] and adds to `dweight_D` and `dbias_D`, as `api.layer_norm_backward` says."""
    num_rows, num_columns = s_TD.shape
    dx_TD = _empty_rows(s_TD) if out is None else out
    if num_rows == 0:
        return dx_TD
    block = triton.next_power_of_2(num_columns)
    tensors = (dy_TD, s_TD, weight_D, mean_T, rstd_T, dresidual_TD, dx_TD)
    strides = (dy_TD.stride(0), s_TD.stride(0), 0 if dresidual_TD is None else dresidual_TD.stride(0), dx_TD.stride(0))
    with torch.cuda.device_of(s_TD):
        if dweight_D is None and dbias_D is None:
            backward_kernel[(num_rows,)](*tensors, *strides, offset, num_columns, block, **row_options(block))
            return dx_TD
        num_programs = min(num_rows, persistent_programs(block, s_TD.device))
        partials = [None if total is None else total.new_empty(num_programs, num_columns) for total in (dweight_D, dbias_D)]
        stages = pipeline_stages(block, block * dy_TD.element_size() * (2 if dresidual_TD is None else 3))
        backward_parameters_kernel[(num_programs,)](
            *tensors, *partials, *strides, num_rows, offset, num_columns, block, stages, **row_options(block)
        )
        for partial_PD, total_D in zip(partials, (dweight_D, dbias_D), strict=True):
            if partial_PD is not None and total_D is not None:
                add_partial_sums(partial_PD, total_D)
    return dx_TD


def _empty_rows(like_TD: Tensor) -> Tensor:
    return torch.empty(like_TD.shape, dtype=like_TD.dtype, device=like_TD.device)
