# pyright: basic, reportArgumentType=false, reportIndexIssue=false
"""Cross-entropy's kernel: one program a row, which reads its logits twice and writes their gradient once.

Owns the kernel and its launch. Leaves validation to `api`, whose docstrings say what the function promises. The first pass keeps a running
maximum and sum in every lane, so that warps meet only once, at its end. The second goes from the last column to the first: what was read
last is still in L2, and a 16-bit gradient may overwrite the upper half of the very row it is taken from.

T: rows, V: vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Below any finite logit that matters, and finite: -inf less -inf would be no number.
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)


@triton.jit
def capped(x, scale, softcap):
    """z of the logits x: scaled, and bounded by the softcap where there is one; the polynomial is tanh where 1 - exp(-2x) would cancel."""
    z = x * scale
    if softcap is not None:
        y = z * (1.0 / softcap)
        e = tl.exp(-2.0 * tl.abs(y))
        tanh = (1.0 - e) / (1.0 + e)
        square = y * y
        small = y * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        z = softcap * tl.where(square < 0.04, small, tl.where(y < 0.0, -tanh, tanh))
    return z


@triton.jit
def slope(x, scale, softcap):
    """dz / d(scale * x) of `capped`, 1 - tanh²."""
    e = tl.exp(-2.0 * tl.abs(x * scale * (1.0 / softcap)))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def accumulate(
    logits_ptr, largest, total, start, scale, softcap, V: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr
):
    """The lanes' running maximum, and sum of exp(z - maximum), after UNROLL more blocks of columns."""
    columns = start + tl.arange(0, UNROLL)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if MASKED:
        x = tl.load(logits_ptr + columns, mask=columns < V, other=0.0, eviction_policy="evict_last").to(tl.float32)
        z = tl.where(columns < V, capped(x, scale, softcap), float("-inf"))
    else:
        z = capped(tl.load(logits_ptr + columns, eviction_policy="evict_last").to(tl.float32), scale, softcap)
    new = tl.maximum(largest, tl.max(z, axis=0))
    total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new[None, :]), axis=0)
    return new, total


@triton.jit
def write_gradient(
    logits_ptr,
    out_ptr,
    target,
    largest,
    soft_scale,
    hard_scale,
    start,
    scale,
    softcap,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """soft_scale * exp(z - largest), less hard_scale at the target, of UNROLL blocks of columns."""
    columns = start + tl.arange(0, UNROLL)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if MASKED:
        x = tl.load(logits_ptr + columns, mask=columns < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
        z = tl.where(columns < V, capped(x, scale, softcap), LOWEST)
    else:
        x = tl.load(logits_ptr + columns, eviction_policy="evict_first").to(tl.float32)
        z = capped(x, scale, softcap)
    gradient = soft_scale * tl.exp(z - largest) - tl.where(columns == target, hard_scale, 0.0)
    if softcap is not None:
        gradient *= slope(x, scale, softcap)
    gradient = gradient.to(out_ptr.dtype.element_ty)
    if OVERLAP:
        tl.debug_barrier()  # what is written lies where others of this program have just read
    if MASKED:
        tl.store(out_ptr + columns, gradient, mask=columns < V)
    else:
        tl.store(out_ptr + columns, gradient)


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    grad_scale_ptr,
    loss_ptr,
    out_ptr,
    logits_stride,
    out_stride,
    scale,
    softcap,
    ignore_index,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Loss and gradient of one row; a row without a label is zeroed, one with an impossible target as well, and its loss is NaN."""
    STEP: tl.constexpr = BLOCK * UNROLL
    NUM_STEPS: tl.constexpr = V // STEP
    REST: tl.constexpr = V % STEP > 0
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    out_ptr += row * out_stride
    target = tl.load(targets_ptr + row)
    if (target >= 0) & (target < V) & (target != ignore_index):
        z_target = capped(tl.load(logits_ptr + target).to(tl.float32), scale, softcap)
        largest = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for step in range(NUM_STEPS):
            largest, total = accumulate(logits_ptr, largest, total, step * STEP, scale, softcap, V, BLOCK, UNROLL, False)
        if REST:
            largest, total = accumulate(logits_ptr, largest, total, NUM_STEPS * STEP, scale, softcap, V, BLOCK, UNROLL, True)
        row_largest = tl.max(largest, axis=0)
        row_total = tl.sum(total * tl.exp(largest - row_largest), axis=0)
        tl.store(loss_ptr + row, row_largest - z_target + tl.log(row_total))

        hard = tl.load(grad_scale_ptr) * scale
        soft = hard / row_total
        column = target.to(tl.int32)
        if REST:
            write_gradient(
                logits_ptr, out_ptr, column, row_largest, soft, hard, NUM_STEPS * STEP, scale, softcap, V, BLOCK, UNROLL, OVERLAP, True
            )
        for step in range(NUM_STEPS):
            start = (NUM_STEPS - 1 - step) * STEP
            write_gradient(logits_ptr, out_ptr, column, row_largest, soft, hard, start, scale, softcap, V, BLOCK, UNROLL, OVERLAP, False)
    else:
        tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, float("nan")))
        for start in range(0, V, STEP):
            columns = start + tl.arange(0, UNROLL)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            tl.store(out_ptr + columns, tl.zeros([UNROLL, BLOCK], out_ptr.dtype.element_ty), mask=columns < V)


def geometry(num_classes: int, element_size: int) -> tuple[int, int, int]:
    """(BLOCK, UNROLL, num_warps) for the narrower element of the two: 16 bytes a thread and block, 16 elements a thread and step.

    A block is what all threads hold of it in one access, so that maxima are taken within a thread. For a large vocabulary one program
    fills an SM, so that few rows share L2.
    """
    num_warps = 32 if num_classes > 32768 else 8 if num_classes > 4096 else 4
    width = 16 // element_size
    return num_warps * 32 * width, 16 // width, num_warps


def cross_entropy_forward_backward_(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    softcap: float | None,
    scale: float,
    grad_scale: Tensor,
    out: Tensor,
    ignore_index: int,
    loss_T: Tensor | None = None,
) -> Tensor:
    """As `api.cross_entropy_forward_backward_`, after validation; the losses go to `loss_T` ([T] fp32) where it is given."""
    num_rows, num_classes = logits_TV.shape
    loss_T = torch.empty(num_rows, dtype=torch.float32, device=logits_TV.device) if loss_T is None else loss_T
    if num_rows == 0:
        return loss_T
    block, unroll, num_warps = geometry(num_classes, min(logits_TV.element_size(), out.element_size()))
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    with torch.cuda.device_of(logits_TV):
        cross_entropy_kernel[(num_rows,)](
            logits_TV,
            targets_T,
            grad_scale,
            loss_T,
            out,
            logits_TV.stride(0),
            out.stride(0),
            scale,
            softcap,
            ignore_index,
            V=num_classes,
            BLOCK=block,
            UNROLL=unroll,
            OVERLAP=logits_TV.dtype != out.dtype and logits_TV.untyped_storage().data_ptr() == out.untyped_storage().data_ptr(),
            **options,
        )
    return loss_T
