# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""AdamW's kernels: one launch over the flat buffer, each element read and written once, fp32 inside; and the norm's two.

Owns the kernels and their launches. Leaves validation to `api`, whose docstrings say what the functions promise. Learning rate, step and
clip coefficient may lie on the device, where a captured CUDA graph finds their new values.

A program takes `GROUP_BLOCK` elements, so that it has one learning rate; in 8 bits that is rows of `QUANTIZATION_BLOCK`. Fusion of multiply
and add is said outright, since Triton is changing its default.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from finery_kernels.adamw.state import GROUP_BLOCK, QUANTIZATION_BLOCK, Groups, State8bit

NORM_BLOCK = 4096
# A constant, and not what fits the card: the sum has one order everywhere.
MAX_NORM_PROGRAMS = 1024

GOLDEN = tl.constexpr(0x9E3779B9)
SPREAD = tl.constexpr(0x27D4EB2F)
MURMUR1 = tl.constexpr(0x85EBCA6B)
MURMUR2 = tl.constexpr(0xC2B2AE35)
ZERO_CODE = tl.constexpr(127)
SMALLEST_NORMAL = tl.constexpr(1.2e-38)
# Midpoints that no decade has inside: to zero and to the decade below in distances from the lower end, to 1 as such.
TO_ZERO = tl.constexpr(0.175 / 0.9)
TO_LOWER_DECADE = tl.constexpr(0.2)
SIGNED_TO_ONE = tl.constexpr(1 - 0.225 / 64)
UNSIGNED_TO_ONE = tl.constexpr(1 - 0.225 / 128)


@triton.jit
def _scalars(lr_ptr, lr, step_ptr, step, log_beta1, log_beta2, weight_decay, group_ptr, lr_scale_ptr, decay_scale_ptr):
    """Factors of the update and of the old parameter, the root of the second bias correction's inverse, and the step.

    The corrections are worked out in fp64, since 1 - beta2 is small.
    """
    if lr_ptr is not None:
        lr = tl.load(lr_ptr)
    if step_ptr is not None:
        step = tl.load(step_ptr)
    step = tl.full((), step, tl.int64)
    decay = weight_decay
    if group_ptr is not None:
        group = tl.load(group_ptr + tl.program_id(0)).to(tl.int32)
        lr = lr * tl.load(lr_scale_ptr + group)
        decay = decay * tl.load(decay_scale_ptr + group)
    correction1 = (1.0 - tl.exp(step.to(tl.float64) * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(step.to(tl.float64) * log_beta2)).to(tl.float32)
    return lr / correction1, 1.0 - lr * decay, 1.0 / tl.sqrt(correction2), step


@triton.jit
def _moments(grad, exp_avg, exp_avg_sq, clip_ptr, beta1, rest1, beta2, rest2):
    if clip_ptr is not None:
        grad = grad * tl.load(clip_ptr)
    return beta1 * exp_avg + rest1 * grad, beta2 * exp_avg_sq + rest2 * grad * grad


@triton.jit
def _noise(index, step):
    """32 bits of each element, a function of its place and of the step alone."""
    return _mixed(((index + step * GOLDEN) ^ ((index >> 32) * SPREAD)) & 0xFFFFFFFF)


@triton.jit
def _mixed(word):
    """MurmurHash3's finalizer, on 32-bit words in int64."""
    bits = word.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * MURMUR1
    bits = (bits ^ (bits >> 13)) * MURMUR2
    return bits ^ (bits >> 16)


@triton.jit
def _rounded(value, noise16):
    """bf16, up or down with the odds of the distances, by the 16 bits of `noise16`; what is not finite is rounded to nearest."""
    bits = value.to(tl.uint32, bitcast=True)
    drawn = ((bits + noise16) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), drawn, value.to(tl.bfloat16))


@triton.jit
def _store_moment(pointers, value, noise16, inside):
    if pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, _rounded(value, noise16), mask=inside)
    else:
        tl.store(pointers, value, mask=inside)


@triton.jit
def _store_params(params_ptr, shadow_ptr, index, inside, value, noise, STOCHASTIC: tl.constexpr):
    if STOCHASTIC:
        tl.store(params_ptr + index, _rounded(value, _mixed(noise) & 0xFFFF), mask=inside)
    else:
        tl.store(params_ptr + index, value.to(params_ptr.dtype.element_ty), mask=inside)
    if shadow_ptr is not None:
        tl.store(shadow_ptr + index, value.to(shadow_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["step"])
def adamw_kernel(
    params_ptr,
    grads_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    shadow_ptr,
    lr_ptr,
    step_ptr,
    clip_ptr,
    group_ptr,
    lr_scale_ptr,
    decay_scale_ptr,
    num_elements,
    lr,
    step,
    beta1,
    rest1,
    log_beta1,
    beta2,
    rest2,
    log_beta2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One step of BLOCK elements; moments in fp32 or bf16."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_elements
    param = tl.load(params_ptr + index, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grads_ptr + index, mask=inside, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + index, mask=inside, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + index, mask=inside, other=0.0).to(tl.float32)
    rate, keep, root, step = _scalars(
        lr_ptr, lr, step_ptr, step, log_beta1, log_beta2, weight_decay, group_ptr, lr_scale_ptr, decay_scale_ptr
    )
    exp_avg, exp_avg_sq = _moments(grad, exp_avg, exp_avg_sq, clip_ptr, beta1, rest1, beta2, rest2)
    value = param * keep - rate * exp_avg / (tl.sqrt(exp_avg_sq) * root + eps)
    noise = _noise(index, step)
    _store_moment(exp_avg_ptr + index, exp_avg, noise & 0xFFFF, inside)
    _store_moment(exp_avg_sq_ptr + index, exp_avg_sq, noise >> 16, inside)
    _store_params(params_ptr, shadow_ptr, index, inside, value, noise, STOCHASTIC)


@triton.jit
def _encoded(value, absmax, SIGNED: tl.constexpr):
    """The code of the dynamic map nearest to value / absmax, worked out without reading the map.

    Values of one decade are equidistant, half a distance off its ends, so that the nearest one's place is a floor. Below a fifth of the
    first distance the nearest value is in the decade below. Negative values mirror positive ones.
    """
    scaled = value * (1.0 / tl.maximum(absmax, SMALLEST_NORMAL))
    size = tl.abs(scaled)
    # The decade, in three questions: four up or not, two, one. Each scales it nearer to 0.1..1, and multiplies what it holds.
    up4 = size > 1e-3
    mantissa = size * tl.where(up4, 1.0, 1e4)
    up2 = mantissa > 0.1
    mantissa *= tl.where(up2, 1.0, 1e2)
    up1 = mantissa > 1.0
    mantissa *= tl.where(up1, 0.1, 1.0)
    count = tl.where(up4, 16, 1) * tl.where(up2, 4, 1) * tl.where(up1, 2, 1)
    # A decade begins after one code less than it holds, or, without signs, two, since each holds twice what the one below does.
    if SIGNED:
        first = ZERO_CODE + count
    else:
        count = count * 2
        first = count - 1
    place = (mantissa - 0.1) * (count.to(tl.float32) * (1 / 0.9))
    code = first + tl.minimum(place.to(tl.int32), count - 1)
    if SIGNED:
        code = tl.where(place < tl.where(count == 1, TO_ZERO, TO_LOWER_DECADE), first - 1, code)
        code = tl.where(size > SIGNED_TO_ONE, 255, code)
        # -1 is no value of the map: its lowest code stands for it.
        code = tl.where(scaled < 0, 2 * ZERO_CODE - tl.minimum(code, 254), code)
    else:
        code = tl.where(place < TO_LOWER_DECADE, first - 1, code)
        code = tl.where(size > UNSIGNED_TO_ONE, 255, code)
        code = tl.where(value > 0, tl.maximum(code, 1), 0)
    return code.to(tl.uint8)


@triton.jit(do_not_specialize=["step"])
def adamw_8bit_kernel(
    params_ptr,
    grads_ptr,
    codes_ptr,
    absmax_ptr,
    codes_sq_ptr,
    absmax_sq_ptr,
    signed_map_ptr,
    unsigned_map_ptr,
    shadow_ptr,
    lr_ptr,
    step_ptr,
    clip_ptr,
    group_ptr,
    lr_scale_ptr,
    decay_scale_ptr,
    num_elements,
    num_blocks,
    lr,
    step,
    beta1,
    rest1,
    log_beta1,
    beta2,
    rest2,
    log_beta2,
    eps,
    weight_decay,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One step of ROWS blocks of COLUMNS elements each; moments in 8 bits with one scale a block."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = block[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = index < num_elements
    block_inside = block < num_blocks
    param = tl.load(params_ptr + index, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grads_ptr + index, mask=inside, other=0.0).to(tl.float32)
    code = tl.load(codes_ptr + index, mask=inside, other=ZERO_CODE).to(tl.int32)
    code_sq = tl.load(codes_sq_ptr + index, mask=inside, other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + block, mask=block_inside, other=0.0)
    absmax_sq = tl.load(absmax_sq_ptr + block, mask=block_inside, other=0.0)
    exp_avg = tl.load(signed_map_ptr + code) * absmax[:, None]
    exp_avg_sq = tl.load(unsigned_map_ptr + code_sq) * absmax_sq[:, None]
    rate, keep, root, step = _scalars(
        lr_ptr, lr, step_ptr, step, log_beta1, log_beta2, weight_decay, group_ptr, lr_scale_ptr, decay_scale_ptr
    )
    exp_avg, exp_avg_sq = _moments(grad, exp_avg, exp_avg_sq, clip_ptr, beta1, rest1, beta2, rest2)
    value = param * keep - rate * exp_avg / (tl.sqrt(exp_avg_sq) * root + eps)
    absmax = tl.max(tl.abs(exp_avg), axis=1)
    absmax_sq = tl.max(exp_avg_sq, axis=1)
    tl.store(absmax_ptr + block, absmax, mask=block_inside)
    tl.store(absmax_sq_ptr + block, absmax_sq, mask=block_inside)
    tl.store(codes_ptr + index, _encoded(exp_avg, absmax[:, None], True), mask=inside)
    tl.store(codes_sq_ptr + index, _encoded(exp_avg_sq, absmax_sq[:, None], False), mask=inside)
    _store_params(params_ptr, shadow_ptr, index, inside, value, _noise(index, step), STOCHASTIC)


@triton.jit(do_not_specialize=["num_tiles"])
def norm_partial_kernel(grads_ptr, partial_ptr, num_elements, num_tiles, BLOCK: tl.constexpr):
    """The squares' sum over tiles p, p + P, …: one fp64 value a program."""
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for tile in tl.range(program, num_tiles, tl.num_programs(0), num_stages=4):
        index = tl.full((), tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grads_ptr + index, mask=index < num_elements, other=0.0).to(tl.float32)
        total += grad * grad
    tl.store(partial_ptr + program, tl.sum(total.to(tl.float64), axis=0))


@triton.jit
def norm_total_kernel(partial_ptr, norm_ptr, PROGRAMS: tl.constexpr):
    """The root of the partial sums' sum."""
    total = tl.sum(tl.load(partial_ptr + tl.arange(0, PROGRAMS)), axis=0)
    tl.store(norm_ptr, tl.sqrt(total).to(tl.float32))


def adamw_(
    params_N: torch.Tensor,
    grads_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    exp_avg_sq_N: torch.Tensor,
    *,
    groups: Groups | None,
    shadow_N: torch.Tensor | None,
    stochastic_rounding: bool,
    **options: Any,
) -> None:
    """One step in place; moments in fp32 or bf16."""
    num_elements = params_N.shape[0]
    if num_elements == 0:
        return
    with torch.cuda.device_of(params_N):
        adamw_kernel[(triton.cdiv(num_elements, GROUP_BLOCK),)](
            params_N,
            grads_N,
            exp_avg_N,
            exp_avg_sq_N,
            shadow_N,
            num_elements=num_elements,
            **_scalar_arguments(groups, **options),
            BLOCK=GROUP_BLOCK,
            STOCHASTIC=stochastic_rounding,
            num_warps=4,
            enable_fp_fusion=True,
        )


def adamw_8bit_(
    params_N: torch.Tensor,
    grads_N: torch.Tensor,
    state: State8bit,
    *,
    groups: Groups | None,
    shadow_N: torch.Tensor | None,
    stochastic_rounding: bool,
    **options: Any,
) -> None:
    """One step in place; moments in 8 bits."""
    num_elements = params_N.shape[0]
    if num_elements == 0:
        return
    with torch.cuda.device_of(params_N):
        adamw_8bit_kernel[(triton.cdiv(num_elements, GROUP_BLOCK),)](
            params_N,
            grads_N,
            state.exp_avg_codes_N,
            state.exp_avg_absmax_B,
            state.exp_avg_sq_codes_N,
            state.exp_avg_sq_absmax_B,
            state.signed_map,
            state.unsigned_map,
            shadow_N,
            num_elements=num_elements,
            num_blocks=state.exp_avg_absmax_B.shape[0],
            **_scalar_arguments(groups, **options),
            ROWS=GROUP_BLOCK // QUANTIZATION_BLOCK,
            COLUMNS=QUANTIZATION_BLOCK,
            STOCHASTIC=stochastic_rounding,
            num_warps=4,
            enable_fp_fusion=True,
        )


def grad_norm(grads_N: torch.Tensor) -> torch.Tensor:
    """L2 norm, fp32, 0-dim: partial sums in a fixed order, then theirs."""
    num_elements = grads_N.shape[0]
    num_tiles = triton.cdiv(num_elements, NORM_BLOCK)
    num_programs = min(MAX_NORM_PROGRAMS, triton.next_power_of_2(max(num_tiles, 1)))
    partial = torch.empty(num_programs, dtype=torch.float64, device=grads_N.device)
    norm = torch.empty((), dtype=torch.float32, device=grads_N.device)
    with torch.cuda.device_of(grads_N):
        norm_partial_kernel[(num_programs,)](
            grads_N, partial, num_elements, num_tiles, BLOCK=NORM_BLOCK, num_warps=8, enable_fp_fusion=True
        )
        norm_total_kernel[(1,)](partial, norm, PROGRAMS=num_programs, num_warps=4, enable_fp_fusion=True)
    return norm


def _scalar_arguments(
    groups: Groups | None,
    *,
    lr: torch.Tensor | float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: torch.Tensor | int,
    clip_coef: torch.Tensor | None,
) -> dict[str, Any]:
    """What both kernels take; 1 - beta and the logarithms are worked out here, in fp64."""
    return {
        "lr_ptr": lr if isinstance(lr, torch.Tensor) else None,
        "step_ptr": step if isinstance(step, torch.Tensor) else None,
        "clip_ptr": clip_coef,
        "group_ptr": None if groups is None else groups.group_of_block_B,
        "lr_scale_ptr": None if groups is None else groups.lr_scale_G,
        "decay_scale_ptr": None if groups is None else groups.decay_scale_G,
        "lr": 0.0 if isinstance(lr, torch.Tensor) else float(lr),
        "step": 0 if isinstance(step, torch.Tensor) else step,
        "beta1": float(beta1),
        "rest1": 1.0 - beta1,
        "log_beta1": math.log(beta1) if beta1 > 0 else float("-inf"),
        "beta2": float(beta2),
        "rest2": 1.0 - beta2,
        "log_beta2": math.log(beta2) if beta2 > 0 else float("-inf"),
        "eps": float(eps),
        "weight_decay": float(weight_decay),
    }
