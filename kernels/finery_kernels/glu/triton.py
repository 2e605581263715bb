# pyright: basic, reportArgumentType=false, reportIndexIssue=false
"""The gated linear unit's kernels: one pass over memory each, a program a stretch of one row, fp32 inside.

Owns the kernels and their launches. Leaves validation to `api`, whose docstrings say what the functions promise.

T rows, F width of the activation; a row of `gate_up` is [gate | up].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor


class Launch(NamedTuple):
    """How a row is shared out: columns a program, and columns a thread, of which eight in bf16 are one access."""

    block: int = 2048
    columns_per_thread: int = 16


LAUNCH = Launch()


@triton.jit
def sigmoid_and_rest(x):
    """s = 1 / (1 + e^-x) and 1 - s, the latter without cancellation; 0 and 1 below -87, where e^-x nears the end of fp32."""
    e = tl.exp(-tl.maximum(x, -87.0))
    s = 1.0 / (1.0 + e)
    return tl.where(x < -87.0, 0.0, s), e * s


@triton.jit
def activated_and_slope(gate, ACTIVATION: tl.constexpr):
    """f(gate) and f'(gate). The tanh formula goes by (1 + tanh u) / 2 = sigmoid(2u), which does not cancel for negative gates."""
    if ACTIVATION == "silu":
        s, rest = sigmoid_and_rest(gate)
        activated = gate * s
        slope = s + activated * rest
    elif ACTIVATION == "gelu_tanh":
        square = gate * gate
        s, rest = sigmoid_and_rest(1.5957691216057308 * gate * (1.0 + 0.044715 * square))
        activated = gate * s
        slope = s + activated * rest * 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        s = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        activated = gate * s
        slope = s + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    return activated, slope


@triton.jit
def forward_kernel(
    gate_up_ptr, out_ptr, gate_up_stride, out_stride, F: tl.constexpr, ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """out = f(gate) * up, for one block of one row. Row strides are multiples of ALIGN."""
    num_blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate_ptr = gate_up_ptr + tl.multiple_of(row * gate_up_stride, ALIGN)
    gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + F + column, mask=inside, other=0.0).to(tl.float32)
    activated, _ = activated_and_slope(gate, ACTIVATION)
    tl.store(out_ptr + tl.multiple_of(row * out_stride, ALIGN) + column, (activated * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dact_ptr,
    gate_up_ptr,
    out_ptr,
    act_ptr,
    dact_stride,
    gate_up_stride,
    out_stride,
    act_stride,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = [dact * up * f'(gate) | dact * f(gate)] for one block of one row; act = f(gate) * up unless `act_ptr` is None.

    Everything is read before anything is written, and every element by the thread that writes it: `out` may be `gate_up` and `act`
    may be `dact`.
    """
    num_blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate_ptr = gate_up_ptr + tl.multiple_of(row * gate_up_stride, ALIGN)
    dgate_ptr = out_ptr + tl.multiple_of(row * out_stride, ALIGN)
    gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + F + column, mask=inside, other=0.0).to(tl.float32)
    dact = tl.load(dact_ptr + tl.multiple_of(row * dact_stride, ALIGN) + column, mask=inside, other=0.0).to(tl.float32)
    activated, slope = activated_and_slope(gate, ACTIVATION)
    tl.store(dgate_ptr + column, (dact * up * slope).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(dgate_ptr + F + column, (dact * activated).to(out_ptr.dtype.element_ty), mask=inside)
    if act_ptr is not None:
        act = (activated * up).to(act_ptr.dtype.element_ty)
        tl.store(act_ptr + tl.multiple_of(row * act_stride, ALIGN) + column, act, mask=inside)


def glu_forward(gate_up_TN: Tensor, *, activation: str, out: Tensor, launch: Launch = LAUNCH) -> Tensor:
    """Writes `f(gate) * up` to `out` [T, F]."""
    num_rows, width = out.shape
    if out.numel():
        grid, options = _grid_and_options(launch, num_rows, width, activation, gate_up_TN, out)
        forward_kernel[grid](gate_up_TN, out, gate_up_TN.stride(0), out.stride(0), **options)
    return out


def glu_backward(
    dact_TF: Tensor, gate_up_TN: Tensor, *, activation: str, out: Tensor, act_out: Tensor | None = None, launch: Launch = LAUNCH
) -> Tensor:
    """Writes `[dact * up * f'(gate) | dact * f(gate)]` to `out` [T, 2F] and, where asked, `f(gate) * up` to `act_out` [T, F]."""
    num_rows, width = dact_TF.shape
    if dact_TF.numel():
        act_stride = 0 if act_out is None else act_out.stride(0)
        tensors = (dact_TF, gate_up_TN, out) if act_out is None else (dact_TF, gate_up_TN, out, act_out)
        grid, options = _grid_and_options(launch, num_rows, width, activation, *tensors)
        strides = (dact_TF.stride(0), gate_up_TN.stride(0), out.stride(0), act_stride)
        backward_kernel[grid](dact_TF, gate_up_TN, out, act_out, *strides, **options)
    return out


def _grid_and_options(launch: Launch, num_rows: int, width: int, activation: str, *tensors: Tensor) -> tuple[tuple[int], dict[str, object]]:
    """Never more threads than elements: a thread's elements are its own."""
    block = min(launch.block, max(32, triton.next_power_of_2(width)))
    # Fusion of multiply and add is said outright, since Triton is changing its default.
    options: dict[str, object] = {
        "F": width,
        "ACTIVATION": activation,
        "ALIGN": math.gcd(16, *(x.stride(0) for x in tensors)),
        "BLOCK": block,
        "num_warps": max(1, block // (32 * launch.columns_per_thread)),
        "enable_fp_fusion": True,
    }
    return (num_rows * triton.cdiv(width, block),), options
