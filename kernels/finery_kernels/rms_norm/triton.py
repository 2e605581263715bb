# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""RMSNorm's kernels: one pass over memory each, one row per program in registers, fp32 inside.

Owns the kernels and their launches. Leaves validation to `api`, whose docstrings say what the functions promise. The weight's gradient
takes a grid that fits the card: each program sums over its rows in registers, and a second kernel adds the partial sums in a fixed order,
so that runs are bit-equal.

T: rows, D: columns, P: programs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

SUM_COLUMNS = 32
SUM_ROWS = 64
SHARED_BYTES_PER_SM = 98304
WARPS_PER_SM = 16


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
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
    """y = s · rstd · (offset + weight) of the program's row; s = x + residual is rounded and stored first, where there is a residual."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    s = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * sum_stride + columns, rounded, mask=inside)
        s = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(s * s, axis=0) * (1.0 / D) + eps))
    tl.store(rstd_ptr + row, rstd)
    y = s * rstd * (weight + offset)
    tl.store(y_ptr + row * y_stride + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr,
    s_ptr,
    weight_ptr,
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
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + row * s_stride + columns, mask=inside, other=0.0).to(tl.float32)
    # Before the reduction, whose barrier no load is moved across.
    dresidual = tl.zeros((BLOCK,), dtype=tl.float32)
    if dresidual_ptr is not None:
        dresidual = tl.load(dresidual_ptr + row * dresidual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    normalised = s * rstd
    scaled = dy * (weight + offset)
    dx = (scaled - normalised * (tl.sum(scaled * normalised, axis=0) * (1.0 / D))) * rstd + dresidual
    tl.store(dx_ptr + row * dx_stride + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def backward_dweight_kernel(
    dy_ptr,
    s_ptr,
    weight_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    partial_ptr,
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
    """dx of rows p, p + P, …; their sum of dy · s · rstd is row p of `partial_ptr` [P, D]. The next rows are fetched meanwhile."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in tl.range(program, num_rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + row * s_stride + columns, mask=inside, other=0.0).to(tl.float32)
        dresidual = tl.zeros((BLOCK,), dtype=tl.float32)
        if dresidual_ptr is not None:
            dresidual = tl.load(dresidual_ptr + row * dresidual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normalised = s * rstd
        dweight += dy * normalised
        scaled = dy * weight
        dx = (scaled - normalised * (tl.sum(scaled * normalised, axis=0) * (1.0 / D))) * rstd + dresidual
        tl.store(dx_ptr + row * dx_stride + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program.to(tl.int64) * D + columns, dweight, mask=inside)


@triton.jit(do_not_specialize=["num_programs"])
def add_partial_sums_kernel(partial_ptr, dweight_ptr, num_programs, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds the sum over the rows of `partial_ptr` [P, D] to `dweight_ptr` [D], for the program's columns."""
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, num_programs, ROWS):
        present = columns[None, :] < tl.where(start + rows < num_programs, D, 0)[:, None]
        total += tl.load(partial_ptr + (start + rows)[:, None] * D + columns[None, :], mask=present, other=0.0)
    before = tl.load(dweight_ptr + columns, mask=inside, other=0.0)
    tl.store(dweight_ptr + columns, before + tl.sum(total, axis=0), mask=inside)


def rms_norm_forward(
    x_TD: Tensor,
    weight_D: Tensor,
    *,
    eps: float,
    offset: float,
    residual_TD: Tensor | None,
    out: Tensor | None,
    residual_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [T, D], s [T, D] (`x_TD` itself without a residual) and rstd [T], as `api.rms_norm_forward` says."""
    num_rows, num_columns = x_TD.shape
    y_TD = _empty_rows(x_TD) if out is None else out
    sum_TD = x_TD
    if residual_TD is not None:
        sum_TD = _empty_rows(x_TD) if residual_out is None else residual_out
    rstd_T = torch.empty(num_rows, dtype=torch.float32, device=x_TD.device)
    if num_rows == 0:
        return y_TD, sum_TD, rstd_T
    block = triton.next_power_of_2(num_columns)
    residual_stride = 0 if residual_TD is None else residual_TD.stride(0)
    strides = (x_TD.stride(0), residual_stride, y_TD.stride(0), sum_TD.stride(0))
    with torch.cuda.device_of(x_TD):
        forward_kernel[(num_rows,)](
            *(x_TD, residual_TD, weight_D, y_TD, sum_TD, rstd_T), *strides, eps, offset, num_columns, block, **row_options(block)
        )
    return y_TD, sum_TD, rstd_T


def rms_norm_backward(
    dy_TD: Tensor,
    s_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    *,
    offset: float,
    dresidual_TD: Tensor | None,
    out: Tensor | None,
    dweight_D: Tensor | None,
) -> Tensor:
    """Returns dx [T, D] and adds to `dweight_D`, as `api.rms_norm_backward` says."""
    num_rows, num_columns = s_TD.shape
    dx_TD = _empty_rows(s_TD) if out is None else out
    if num_rows == 0:
        return dx_TD
    block = triton.next_power_of_2(num_columns)
    tensors = (dy_TD, s_TD, weight_D, rstd_T, dresidual_TD, dx_TD)
    strides = (dy_TD.stride(0), s_TD.stride(0), 0 if dresidual_TD is None else dresidual_TD.stride(0), dx_TD.stride(0))
    with torch.cuda.device_of(s_TD):
        if dweight_D is None:
            backward_kernel[(num_rows,)](*tensors, *strides, offset, num_columns, block, **row_options(block))
            return dx_TD
        num_programs = min(num_rows, persistent_programs(block, s_TD.device))
        partial_PD = torch.empty(num_programs, num_columns, dtype=torch.float32, device=s_TD.device)
        row_bytes = block * (dy_TD.element_size() * (2 if dresidual_TD is None else 3))
        stages = pipeline_stages(block, row_bytes)
        backward_dweight_kernel[(num_programs,)](
            *tensors, partial_PD, *strides, num_rows, offset, num_columns, block, stages, **row_options(block)
        )
        add_partial_sums(partial_PD, dweight_D)
    return dx_TD


def add_partial_sums(partial_PD: Tensor, dweight_D: Tensor) -> None:
    """Adds the sum over the rows of `partial_PD` to `dweight_D`, both fp32 and contiguous, in a fixed order."""
    num_programs, num_columns = partial_PD.shape
    add_partial_sums_kernel[(triton.cdiv(num_columns, SUM_COLUMNS),)](
        partial_PD, dweight_D, num_programs, num_columns, SUM_ROWS, SUM_COLUMNS, num_warps=4, enable_fp_fusion=True
    )


def row_options(block: int) -> dict[str, int | bool]:
    """Launch options for a row of `block` columns: 16 columns a thread, which is two accesses of 16 bytes in bf16.

    Fusion of multiply and add is said outright, since Triton is changing its default.
    """
    return {"num_warps": min(max(block // 512, 1), 32), "enable_fp_fusion": True}


def persistent_programs(block: int, device: torch.device) -> int:
    """Programs of a grid that fits the card at once; four under the interpreter."""
    num_multiprocessors = _num_multiprocessors(device) if device.type == "cuda" else 4
    return num_multiprocessors * (_programs_per_multiprocessor(block) if device.type == "cuda" else 1)


def pipeline_stages(block: int, row_bytes: int) -> int:
    """Stages of a loop over rows of `row_bytes`: all but one are in flight and take shared memory, the resident programs share it."""
    return min(1 + SHARED_BYTES_PER_SM // _programs_per_multiprocessor(block) // row_bytes, 4)


def _programs_per_multiprocessor(block: int) -> int:
    return max(WARPS_PER_SM // int(row_options(block)["num_warps"]), 1)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _empty_rows(like_TD: Tensor) -> Tensor:
    return torch.empty(like_TD.shape, dtype=like_TD.dtype, device=like_TD.device)
