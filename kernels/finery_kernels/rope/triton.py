# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
"""The kernels of the rotary embedding and of the per-head RMSNorm before it: one launch for all heads of a token, fp32 inside.

Owns the kernels and their launches. Leaves validation to `api`, whose docstrings say what the functions promise. A program takes a token's
heads HEADS_BLOCK at a time, so that cosines, sines and weights are read once; a head is two halves of the rotary part and a rest. Every
element is read before it is written, by the thread that writes it, so sources may be targets. The norm weights' gradients take a
grid of fixed size: each program sums over its tokens in registers, and the partial sums are added in a fixed order.

Legend: T tokens, H query heads, K key heads, G = H + K, d head dimension, R rotary dimension, P positions of the tables. A table is
(cos_PR, sin_PR, positions_T) or None, where nothing is rotated. Sources and targets are (q_THd, k_THd) or (q_THd, k_THd, v_THd).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]
Table = tuple[Tensor, Tensor, Tensor]


class Launch(NamedTuple):
    """How tokens and heads are shared out.

    `tile` is the pairs of rotated elements a program takes at a time, `pairs_per_thread` sets its threads. Sums of the weights' gradients
    fill the registers: there, `programs_per_sm` programs of at most `max_registers` a thread run on a multiprocessor, which spills a few
    bytes.
    """

    tile: int = 512
    pairs_per_thread: int = 8
    programs_per_sm: int = 6
    max_registers: int = 168


LAUNCH = Launch()


@triton.jit
def load_angles(cos_ptr, sin_ptr, position_ptr, num_positions, row, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, ROTATE: tl.constexpr):
    """The cosines and sines of the row's position, [HALF_BLOCK]; NaN where the tables have no such position, 0 beyond HALF."""
    column = tl.arange(0, HALF_BLOCK)
    cos = tl.zeros((HALF_BLOCK,), tl.float32)
    sin = tl.zeros((HALF_BLOCK,), tl.float32)
    if ROTATE:
        position = tl.load(position_ptr + row).to(tl.int64)
        known = (position >= 0) & (position < num_positions)
        inside = column < tl.where(known, HALF, 0)
        missing = tl.where(known, 0.0, float("nan"))
        cos = tl.load(cos_ptr + position * (2 * HALF) + column, mask=inside, other=missing)
        sin = tl.load(sin_ptr + position * (2 * HALF) + column, mask=inside, other=missing)
    return cos, sin


@triton.jit
def load_weight(ptr, offset, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr):
    """offset + weight for columns START to START + COLUMNS, [BLOCK]."""
    column = tl.arange(0, BLOCK)
    return tl.load(ptr + START + column, mask=column < COLUMNS, other=0.0).to(tl.float32) + offset


@triton.jit
def rotated(first, second, cos, sin, INVERSE: tl.constexpr, ROTATE: tl.constexpr):
    """Both halves [heads, half] of the rotary part, rotated by the angle or by minus it."""
    if ROTATE:
        cosine = cos[None, :]
        sine = sin[None, :]
        if INVERSE:
            sine = -sine
        turned_first = first * cosine - second * sine
        turned_second = second * cosine + first * sine
    else:
        turned_first = first
        turned_second = second
    return turned_first, turned_second


@triton.jit
def tile(start, HEADS: tl.constexpr, COLUMNS: tl.constexpr, HEADS_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Heads [HEADS_BLOCK, 1] and columns [1, BLOCK] of a tile, and the mask of those that exist.

    Heads count in 64 bits: where they come before tokens in memory, they may lie 2^31 elements apart.
    """
    head = start + tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    return head.to(tl.int64), column, (head < HEADS) & (column < COLUMNS)


@triton.jit
def copy_heads(
    source_ptr,
    target_ptr,
    source_stride,
    target_stride,
    HEADS: tl.constexpr,
    START: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies columns START to START + COLUMNS of every head."""
    for start in tl.static_range(0, HEADS, HEADS_BLOCK):
        head, column, inside = tile(start, HEADS, COLUMNS, HEADS_BLOCK, BLOCK)
        x = tl.load(source_ptr + START + head * source_stride + column, mask=inside)
        tl.store(target_ptr + START + head * target_stride + column, x, mask=inside)


@triton.jit
def rotate_heads(
    source_ptr,
    target_ptr,
    source_stride,
    target_stride,
    cos,
    sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotates the rotary part of every head."""
    for start in tl.static_range(0, HEADS, HEADS_BLOCK):
        head, column, inside = tile(start, HEADS, HALF, HEADS_BLOCK, HALF_BLOCK)
        source = source_ptr + head * source_stride + column
        target = target_ptr + head * target_stride + column
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        first, second = rotated(first, second, cos, sin, INVERSE, True)
        tl.store(target, first.to(target_ptr.dtype.element_ty), mask=inside)
        tl.store(target + HALF, second.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_rotate_heads(
    source_ptr,
    target_ptr,
    pre_ptr,
    rstd_ptr,
    weight_ptr,
    source_stride,
    target_stride,
    pre_stride,
    cos,
    sin,
    eps,
    norm_offset,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Norms and rotates every head of a token; stores rstd and, unless `pre_ptr` is None, the heads as they were."""
    weight_first = load_weight(weight_ptr, norm_offset, HALF, HALF_BLOCK, 0)
    weight_second = load_weight(weight_ptr, norm_offset, HALF, HALF_BLOCK, HALF)
    weight_rest = load_weight(weight_ptr, norm_offset, REST, REST_BLOCK, 2 * HALF)
    for start in tl.static_range(0, HEADS, HEADS_BLOCK):
        head, column, inside = tile(start, HEADS, HALF, HEADS_BLOCK, HALF_BLOCK)
        source = source_ptr + head * source_stride + column
        target = target_ptr + head * target_stride + column
        first = tl.load(source, mask=inside, other=0.0)
        second = tl.load(source + HALF, mask=inside, other=0.0)
        if pre_ptr is not None:
            tl.store(pre_ptr + head * pre_stride + column, first, mask=inside)
            tl.store(pre_ptr + HALF + head * pre_stride + column, second, mask=inside)
        if REST > 0:
            _, rest_column, rest_inside = tile(start, HEADS, REST, HEADS_BLOCK, REST_BLOCK)
            rest = tl.load(source_ptr + 2 * HALF + head * source_stride + rest_column, mask=rest_inside, other=0.0)
            if pre_ptr is not None:
                tl.store(pre_ptr + 2 * HALF + head * pre_stride + rest_column, rest, mask=rest_inside)
            rest = rest.to(tl.float32)
        first = first.to(tl.float32)
        second = second.to(tl.float32)
        squares = tl.sum(first * first + second * second, axis=1)
        if REST > 0:
            squares += tl.sum(rest * rest, axis=1)
        rstd = tl.rsqrt(squares * (1.0 / (2 * HALF + REST)) + eps)
        heads = start + tl.arange(0, HEADS_BLOCK)
        tl.store(rstd_ptr + heads, rstd, mask=heads < HEADS)
        if REST > 0:
            rest = rest * rstd[:, None] * weight_rest[None, :]
            rest_target = target_ptr + 2 * HALF + head * target_stride + rest_column
            tl.store(rest_target, rest.to(target_ptr.dtype.element_ty), mask=rest_inside)
        first = first * rstd[:, None] * weight_first[None, :]
        second = second * rstd[:, None] * weight_second[None, :]
        first, second = rotated(first, second, cos, sin, False, ROTATE)
        tl.store(target, first.to(target_ptr.dtype.element_ty), mask=inside)
        tl.store(target + HALF, second.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_rotate_heads_backward(
    gradient_ptr,
    pre_ptr,
    target_ptr,
    rstd_ptr,
    weight_ptr,
    gradient_stride,
    pre_stride,
    target_stride,
    cos,
    sin,
    norm_offset,
    dweight_first,
    dweight_second,
    dweight_rest,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
    DWEIGHT: tl.constexpr,
):
    """The gradient of `norm_rotate_heads` by its heads; returns the weight's gradient so far, by head of a tile, this token's in it."""
    weight_first = load_weight(weight_ptr, norm_offset, HALF, HALF_BLOCK, 0)
    weight_second = load_weight(weight_ptr, norm_offset, HALF, HALF_BLOCK, HALF)
    weight_rest = load_weight(weight_ptr, norm_offset, REST, REST_BLOCK, 2 * HALF)
    for start in tl.static_range(0, HEADS, HEADS_BLOCK):
        head, column, inside = tile(start, HEADS, HALF, HEADS_BLOCK, HALF_BLOCK)
        heads = start + tl.arange(0, HEADS_BLOCK)
        gradient = gradient_ptr + head * gradient_stride + column
        pre = pre_ptr + head * pre_stride + column
        rstd = tl.load(rstd_ptr + heads, mask=heads < HEADS, other=0.0)[:, None]
        first = tl.load(gradient, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(gradient + HALF, mask=inside, other=0.0).to(tl.float32)
        hat_first = tl.load(pre, mask=inside, other=0.0).to(tl.float32) * rstd
        hat_second = tl.load(pre + HALF, mask=inside, other=0.0).to(tl.float32) * rstd
        if REST > 0:
            _, rest_column, rest_inside = tile(start, HEADS, REST, HEADS_BLOCK, REST_BLOCK)
            rest = tl.load(gradient_ptr + 2 * HALF + head * gradient_stride + rest_column, mask=rest_inside, other=0.0).to(tl.float32)
            hat_rest = tl.load(pre_ptr + 2 * HALF + head * pre_stride + rest_column, mask=rest_inside, other=0.0).to(tl.float32) * rstd
        first, second = rotated(first, second, cos, sin, True, ROTATE)
        if DWEIGHT:
            dweight_first += first * hat_first
            dweight_second += second * hat_second
        first = first * weight_first[None, :]
        second = second * weight_second[None, :]
        mean = tl.sum(first * hat_first + second * hat_second, axis=1)
        if REST > 0:
            if DWEIGHT:
                dweight_rest += rest * hat_rest
            rest = rest * weight_rest[None, :]
            mean += tl.sum(rest * hat_rest, axis=1)
        mean = (mean * (1.0 / (2 * HALF + REST)))[:, None]
        target = target_ptr + head * target_stride + column
        tl.store(target, ((first - hat_first * mean) * rstd).to(target_ptr.dtype.element_ty), mask=inside)
        tl.store(target + HALF, ((second - hat_second * mean) * rstd).to(target_ptr.dtype.element_ty), mask=inside)
        if REST > 0:
            rest_target = target_ptr + 2 * HALF + head * target_stride + rest_column
            tl.store(rest_target, ((rest - hat_rest * mean) * rstd).to(target_ptr.dtype.element_ty), mask=rest_inside)
    return dweight_first, dweight_second, dweight_rest


@triton.jit(do_not_specialize=["num_positions"])
def rotate_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    num_positions,
    q_row,
    k_row,
    v_row,
    q_out_row,
    k_out_row,
    v_out_row,
    q_head,
    k_head,
    v_head,
    q_out_head,
    k_out_head,
    v_out_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    INVERSE: tl.constexpr,
    ROTATE: tl.constexpr,
    COPY_REST: tl.constexpr,
):
    """Rotates the queries and keys of one token, and copies its values unless `v_ptr` is None. Strides are multiples of ALIGN."""
    row = tl.program_id(0).to(tl.int64)
    q = q_ptr + tl.multiple_of(row * q_row, ALIGN)
    k = k_ptr + tl.multiple_of(row * k_row, ALIGN)
    q_out = q_out_ptr + tl.multiple_of(row * q_out_row, ALIGN)
    k_out = k_out_ptr + tl.multiple_of(row * k_out_row, ALIGN)
    if ROTATE:
        cos, sin = load_angles(cos_ptr, sin_ptr, position_ptr, num_positions, row, HALF, HALF_BLOCK, True)
        rotate_heads(q, q_out, q_head, q_out_head, cos, sin, Q_HEADS, HALF, HEADS_BLOCK, HALF_BLOCK, INVERSE)
        rotate_heads(k, k_out, k_head, k_out_head, cos, sin, K_HEADS, HALF, HEADS_BLOCK, HALF_BLOCK, INVERSE)
        if COPY_REST:
            copy_heads(q, q_out, q_head, q_out_head, Q_HEADS, 2 * HALF, REST, HEADS_BLOCK, REST_BLOCK)
            copy_heads(k, k_out, k_head, k_out_head, K_HEADS, 2 * HALF, REST, HEADS_BLOCK, REST_BLOCK)
    else:
        copy_heads(q, q_out, q_head, q_out_head, Q_HEADS, 0, 2 * HALF + REST, HEADS_BLOCK, HEAD_BLOCK)
        copy_heads(k, k_out, k_head, k_out_head, K_HEADS, 0, 2 * HALF + REST, HEADS_BLOCK, HEAD_BLOCK)
    if v_ptr is not None:
        v = v_ptr + tl.multiple_of(row * v_row, ALIGN)
        v_out = v_out_ptr + tl.multiple_of(row * v_out_row, ALIGN)
        copy_heads(v, v_out, v_head, v_out_head, K_HEADS, 0, 2 * HALF + REST, HEADS_BLOCK, HEAD_BLOCK)


@triton.jit(do_not_specialize=["num_positions"])
def norm_rotate_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    q_pre_ptr,
    k_pre_ptr,
    rstd_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    num_positions,
    eps,
    norm_offset,
    q_row,
    k_row,
    q_out_row,
    k_out_row,
    q_pre_row,
    k_pre_row,
    q_head,
    k_head,
    q_out_head,
    k_out_head,
    q_pre_head,
    k_pre_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Norms and rotates the queries and keys of one token. Strides are multiples of ALIGN."""
    row = tl.program_id(0).to(tl.int64)
    q = q_ptr + tl.multiple_of(row * q_row, ALIGN)
    k = k_ptr + tl.multiple_of(row * k_row, ALIGN)
    q_out = q_out_ptr + tl.multiple_of(row * q_out_row, ALIGN)
    k_out = k_out_ptr + tl.multiple_of(row * k_out_row, ALIGN)
    q_pre = None
    k_pre = None
    if q_pre_ptr is not None:
        q_pre = q_pre_ptr + tl.multiple_of(row * q_pre_row, ALIGN)
        k_pre = k_pre_ptr + tl.multiple_of(row * k_pre_row, ALIGN)
    rstd = rstd_ptr + row * (Q_HEADS + K_HEADS)
    cos, sin = load_angles(cos_ptr, sin_ptr, position_ptr, num_positions, row, HALF, HALF_BLOCK, ROTATE)
    norm_rotate_heads(
        q, q_out, q_pre, rstd, q_weight_ptr, q_head, q_out_head, q_pre_head, cos, sin, eps, norm_offset,
        Q_HEADS, HALF, REST, HEADS_BLOCK, HALF_BLOCK, REST_BLOCK, ROTATE,
    )  # fmt: skip
    norm_rotate_heads(
        k, k_out, k_pre, rstd + Q_HEADS, k_weight_ptr, k_head, k_out_head, k_pre_head, cos, sin, eps, norm_offset,
        K_HEADS, HALF, REST, HEADS_BLOCK, HALF_BLOCK, REST_BLOCK, ROTATE,
    )  # fmt: skip


@triton.jit
def store_partial(ptr, dweight, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums [heads, BLOCK] over the heads and stores the columns that exist."""
    column = tl.arange(0, BLOCK)
    tl.store(ptr + column, tl.sum(dweight, axis=0), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["num_rows", "num_positions"])
def norm_rotate_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_pre_ptr,
    k_pre_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    rstd_ptr,
    q_weight_ptr,
    k_weight_ptr,
    partial_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    num_rows,
    num_positions,
    norm_offset,
    dq_row,
    dk_row,
    dv_row,
    q_pre_row,
    k_pre_row,
    q_out_row,
    k_out_row,
    v_out_row,
    dq_head,
    dk_head,
    dv_head,
    q_pre_head,
    k_pre_head,
    q_out_head,
    k_out_head,
    v_out_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """The gradient of `norm_rotate_kernel` for tokens p, p + programs, …; copies values unless `dv_ptr` is None.

    Unless `partial_ptr` is None, its row p of [programs, 2, d] gets these tokens' share of the weights' gradients, queries first.
    """
    DWEIGHT: tl.constexpr = partial_ptr is not None  # pyright: ignore[reportAssignmentType]
    dq_first = tl.zeros((HEADS_BLOCK, HALF_BLOCK), tl.float32)
    dq_second = tl.zeros((HEADS_BLOCK, HALF_BLOCK), tl.float32)
    dq_rest = tl.zeros((HEADS_BLOCK, REST_BLOCK), tl.float32)
    dk_first = tl.zeros((HEADS_BLOCK, HALF_BLOCK), tl.float32)
    dk_second = tl.zeros((HEADS_BLOCK, HALF_BLOCK), tl.float32)
    dk_rest = tl.zeros((HEADS_BLOCK, REST_BLOCK), tl.float32)
    for index in tl.range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        rstd = rstd_ptr + row * (Q_HEADS + K_HEADS)
        cos, sin = load_angles(cos_ptr, sin_ptr, position_ptr, num_positions, row, HALF, HALF_BLOCK, ROTATE)
        dq_first, dq_second, dq_rest = norm_rotate_heads_backward(
            dq_ptr + tl.multiple_of(row * dq_row, ALIGN),
            q_pre_ptr + tl.multiple_of(row * q_pre_row, ALIGN),
            q_out_ptr + tl.multiple_of(row * q_out_row, ALIGN),
            rstd, q_weight_ptr, dq_head, q_pre_head, q_out_head, cos, sin, norm_offset, dq_first, dq_second, dq_rest,
            Q_HEADS, HALF, REST, HEADS_BLOCK, HALF_BLOCK, REST_BLOCK, ROTATE, DWEIGHT,
        )  # fmt: skip
        dk_first, dk_second, dk_rest = norm_rotate_heads_backward(
            dk_ptr + tl.multiple_of(row * dk_row, ALIGN),
            k_pre_ptr + tl.multiple_of(row * k_pre_row, ALIGN),
            k_out_ptr + tl.multiple_of(row * k_out_row, ALIGN),
            rstd + Q_HEADS, k_weight_ptr, dk_head, k_pre_head, k_out_head, cos, sin, norm_offset, dk_first, dk_second, dk_rest,
            K_HEADS, HALF, REST, HEADS_BLOCK, HALF_BLOCK, REST_BLOCK, ROTATE, DWEIGHT,
        )  # fmt: skip
        if dv_ptr is not None:
            dv = dv_ptr + tl.multiple_of(row * dv_row, ALIGN)
            v_out = v_out_ptr + tl.multiple_of(row * v_out_row, ALIGN)
            copy_heads(dv, v_out, dv_head, v_out_head, K_HEADS, 0, 2 * HALF + REST, HEADS_BLOCK, HEAD_BLOCK)
    if DWEIGHT:
        q_partial = partial_ptr + tl.program_id(0) * (2 * (2 * HALF + REST))
        k_partial = q_partial + 2 * HALF + REST
        store_partial(q_partial, dq_first, HALF, HALF_BLOCK)
        store_partial(q_partial + HALF, dq_second, HALF, HALF_BLOCK)
        store_partial(k_partial, dk_first, HALF, HALF_BLOCK)
        store_partial(k_partial + HALF, dk_second, HALF, HALF_BLOCK)
        if REST > 0:
            store_partial(q_partial + 2 * HALF, dq_rest, REST, REST_BLOCK)
            store_partial(k_partial + 2 * HALF, dk_rest, REST, REST_BLOCK)


def rotate(sources: Tensors, targets: Tensors, table: Table | None, *, inverse: bool, launch: Launch = LAUNCH) -> None:
    """Rotates every query and key head of `sources` into `targets`, by its position's angle or by minus that; copies values, if any."""
    if not sources[0].numel():
        return
    in_place = sources[0].data_ptr() == targets[0].data_ptr() and sources[1].data_ptr() == targets[1].data_ptr()
    tensors = (*_with_values(sources), *_with_values(targets))
    shape = _shape(sources, table, tensors, launch)
    options = {**shape.constants, "INVERSE": inverse, "COPY_REST": shape.rest > 0 and not in_place}
    rotate_kernel[(shape.num_rows,)](*tensors, *_table_arguments(table), *_strides(tensors), **options)


def norm_rotate(
    sources: Tensors,
    targets: Tensors,
    weights: Tensors,
    table: Table | None,
    *,
    eps: float,
    norm_offset: float,
    rstd_TG: Tensor,
    pre: Tensors | None = None,
    launch: Launch = LAUNCH,
) -> None:
    """RMSNorm over each head of `sources`, then the rotation, into `targets`; keeps the reciprocal deviations and, in `pre`, sources."""
    if not sources[0].numel():
        return
    tensors = (*sources, *targets, *(pre or (None, None)))
    shape = _shape(sources, table, tensors, launch)
    options = dict(shape.constants)
    del options["HEAD_BLOCK"]
    arguments = (*tensors, rstd_TG, *weights, *_table_arguments(table), eps, norm_offset, *_strides(tensors))
    norm_rotate_kernel[(shape.num_rows,)](*arguments, **options)


def norm_rotate_backward(
    gradients: Tensors,
    pre: Tensors,
    targets: Tensors,
    weights: Tensors,
    table: Table | None,
    *,
    norm_offset: float,
    rstd_TG: Tensor,
    dweights: Tensors | None = None,
    num_programs: int | None = None,
    launch: Launch = LAUNCH,
) -> None:
    """The gradient of `norm_rotate` by its sources into `targets`; that of the weights is added to `dweights`. Copies values, if any.

    `num_programs` share the tokens where there are `dweights`; by default as many as the card runs at once.
    """
    if not gradients[0].numel():
        return
    tensors = (*_with_values(gradients), *pre, *_with_values(targets))
    shape = _shape(gradients, table, tensors, launch)
    programs, partial_P2d, options = shape.num_rows, None, dict(shape.constants)
    if dweights is not None:
        options["maxnreg"] = launch.max_registers
        programs = min(programs, num_programs or launch.programs_per_sm * _num_sms(gradients[0].device))
        partial_P2d = torch.empty((programs, 2, gradients[0].shape[2]), dtype=torch.float32, device=gradients[0].device)
    cos_PR, sin_PR, positions_T, limit = _table_arguments(table)
    operands = (*tensors, rstd_TG, *weights, partial_P2d, cos_PR, sin_PR, positions_T)
    arguments = (*operands, shape.num_rows, limit, norm_offset, *_strides(tensors))
    norm_rotate_backward_kernel[(programs,)](*arguments, **options)
    if dweights is not None and partial_P2d is not None:
        for dweight_d, sum_d in zip(dweights, partial_P2d.sum(dim=0), strict=True):
            dweight_d.add_(sum_d)


class _Shape(NamedTuple):
    num_rows: int
    rest: int
    constants: dict[str, int | bool]


def _shape(heads: Tensors, table: Table | None, tensors: tuple[Tensor | None, ...], launch: Launch) -> _Shape:
    """Never more threads than a tile has elements: a thread's elements are its own."""
    num_rows, num_heads, head_dim = heads[0].shape
    half = (head_dim if table is None else table[0].shape[1]) // 2
    rest = head_dim - 2 * half
    half_block, rest_block = triton.next_power_of_2(half), triton.next_power_of_2(max(rest, 1))
    heads_block = min(max(1, launch.tile // half_block), triton.next_power_of_2(num_heads))
    num_warps = max(1, min(heads_block * half_block // (32 * launch.pairs_per_thread), heads_block * rest_block // 32 if rest else 32))
    # Fusion of multiply and add is said outright, since Triton is changing its default.
    constants: dict[str, int | bool] = {
        "Q_HEADS": num_heads,
        "K_HEADS": heads[1].shape[1],
        "HALF": half,
        "REST": rest,
        "HEADS_BLOCK": heads_block,
        "HALF_BLOCK": half_block,
        "REST_BLOCK": rest_block,
        "HEAD_BLOCK": triton.next_power_of_2(head_dim),
        "ALIGN": math.gcd(16, *_strides(tensors)),
        "ROTATE": table is not None,
        "num_warps": triton.next_power_of_2(num_warps),
        "enable_fp_fusion": True,
    }
    return _Shape(num_rows, rest, constants)


def _with_values(heads: Tensors) -> tuple[Tensor | None, ...]:
    return heads if len(heads) == 3 else (*heads, None)


def _table_arguments(table: Table | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    return (None, None, None, 0) if table is None else (*table, table[0].shape[0])


def _strides(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """All row strides, then all head strides; 0 for a tensor that is not there."""
    present = [(0, 0) if x is None else (x.stride(0), x.stride(1)) for x in tensors]
    return (*(row for row, _ in present), *(head for _, head in present))


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
