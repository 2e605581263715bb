"""AdamW in plain torch, on any device: the oracle of the tests, and what runs without a GPU.

Works slice by slice, so that temporaries stay small, and in fp32 (fp64 for fp64 parameters) with one rounding at the end.

Suffixes: N elements of the flat buffer, C elements of a slice, B blocks, Q elements of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from finery_kernels.adamw.state import GROUP_BLOCK, QUANTIZATION_BLOCK, Groups, State8bit

SLICE = 1 << 22
_WORD = 0xFFFFFFFF


def adamw_(
    params_N: torch.Tensor,
    grads_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    exp_avg_sq_N: torch.Tensor,
    *,
    lr: torch.Tensor | float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: torch.Tensor | int,
    clip_coef: torch.Tensor | None,
    groups: Groups | None,
    shadow_N: torch.Tensor | None,
    stochastic_rounding: bool,
) -> None:
    """One step in place; states in fp32 (fp64) or bf16."""
    for part in _slices(params_N.shape[0]):
        wide = torch.float64 if params_N.dtype == torch.float64 else torch.float32
        exp_avg_C, exp_avg_sq_C = exp_avg_N[part].to(wide), exp_avg_sq_N[part].to(wide)
        new_C = _update(
            params_N[part].to(wide),
            grads_N[part].to(wide),
            exp_avg_C,
            exp_avg_sq_C,
            rates=_rates(part, groups, lr, weight_decay, params_N.device, wide),
            betas=(beta1, beta2),
            eps=eps,
            step=step,
            clip_coef=clip_coef,
        )
        noise_C = _noise(part, step, params_N.device)
        exp_avg_N[part] = _rounded(exp_avg_C, exp_avg_N.dtype, noise_C & 0xFFFF)
        exp_avg_sq_N[part] = _rounded(exp_avg_sq_C, exp_avg_sq_N.dtype, noise_C >> 16)
        _store_params(new_C, params_N[part], None if shadow_N is None else shadow_N[part], noise_C if stochastic_rounding else None)


def adamw_8bit_(
    params_N: torch.Tensor,
    grads_N: torch.Tensor,
    state: State8bit,
    *,
    lr: torch.Tensor | float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: torch.Tensor | int,
    clip_coef: torch.Tensor | None,
    groups: Groups | None,
    shadow_N: torch.Tensor | None,
    stochastic_rounding: bool,
) -> None:
    """One step in place; states in 8 bits."""
    for part in _slices(params_N.shape[0]):
        blocks = slice(part.start // QUANTIZATION_BLOCK, -(-part.stop // QUANTIZATION_BLOCK))
        exp_avg_C = _decoded(state.exp_avg_codes_N[part], state.exp_avg_absmax_B[blocks], state.signed_map)
        exp_avg_sq_C = _decoded(state.exp_avg_sq_codes_N[part], state.exp_avg_sq_absmax_B[blocks], state.unsigned_map)
        new_C = _update(
            params_N[part].float(),
            grads_N[part].float(),
            exp_avg_C,
            exp_avg_sq_C,
            rates=_rates(part, groups, lr, weight_decay, params_N.device, torch.float32),
            betas=(beta1, beta2),
            eps=eps,
            step=step,
            clip_coef=clip_coef,
        )
        _encode(exp_avg_C, state.exp_avg_codes_N[part], state.exp_avg_absmax_B[blocks], state.signed_map)
        _encode(exp_avg_sq_C, state.exp_avg_sq_codes_N[part], state.exp_avg_sq_absmax_B[blocks], state.unsigned_map)
        noise_C = _noise(part, step, params_N.device) if stochastic_rounding else None
        _store_params(new_C, params_N[part], None if shadow_N is None else shadow_N[part], noise_C)


def grad_norm(grads_N: torch.Tensor) -> torch.Tensor:
    """L2 norm, fp32, 0-dim."""
    sums = [grads_N[part].double().square().sum() for part in _slices(grads_N.shape[0])]
    total = torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=grads_N.device)
    return total.sqrt().float()


def _slices(num_elements: int) -> Iterator[slice]:
    for start in range(0, num_elements, SLICE):
        yield slice(start, min(start + SLICE, num_elements))


def _rates(
    part: slice, groups: Groups | None, lr: torch.Tensor | float, weight_decay: float, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The learning rate and the factor of weight decay, 0-dim or of each element."""
    base = lr.to(dtype) if isinstance(lr, torch.Tensor) else torch.tensor(lr, dtype=dtype, device=device)
    if groups is None:
        return base, 1 - base * weight_decay
    blocks_B = groups.group_of_block_B[part.start // GROUP_BLOCK : -(-part.stop // GROUP_BLOCK)].long()
    size = part.stop - part.start
    lr_C = (groups.lr_scale_G.to(dtype)[blocks_B] * base).repeat_interleave(GROUP_BLOCK)[:size]
    decay_C = (groups.decay_scale_G.to(dtype)[blocks_B] * weight_decay).repeat_interleave(GROUP_BLOCK)[:size]
    return lr_C, 1 - lr_C * decay_C


def _update(
    params_C: torch.Tensor,
    grads_C: torch.Tensor,
    exp_avg_C: torch.Tensor,
    exp_avg_sq_C: torch.Tensor,
    *,
    rates: tuple[torch.Tensor, torch.Tensor],
    betas: tuple[float, float],
    eps: float,
    step: torch.Tensor | int,
    clip_coef: torch.Tensor | None,
) -> torch.Tensor:
    """New parameters; the moments are updated in place."""
    lr, keep = rates
    if clip_coef is not None:
        grads_C = grads_C * clip_coef.to(grads_C.dtype)
    exp_avg_C.mul_(betas[0]).add_(grads_C, alpha=1 - betas[0])
    exp_avg_sq_C.mul_(betas[1]).addcmul_(grads_C, grads_C, value=1 - betas[1])
    correction1, correction2 = (_bias_correction(beta, step, grads_C.dtype) for beta in betas)
    denominator_C = (exp_avg_sq_C / correction2).sqrt_().add_(eps)
    return params_C * keep - lr * (exp_avg_C / correction1) / denominator_C


def _bias_correction(beta: float, step: torch.Tensor | int, dtype: torch.dtype) -> torch.Tensor | float:
    if isinstance(step, torch.Tensor):
        return (-torch.expm1(step.double() * math.log(beta))).to(dtype) if beta > 0 else 1.0
    return 1 - beta**step


def _store_params(new_C: torch.Tensor, params_C: torch.Tensor, shadow_C: torch.Tensor | None, noise_C: torch.Tensor | None) -> None:
    if noise_C is not None:
        params_C.copy_(_rounded(new_C, params_C.dtype, _mixed(noise_C) & 0xFFFF))
    else:
        params_C.copy_(new_C)
    if shadow_C is not None:
        shadow_C.copy_(new_C)


def _noise(part: slice, step: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    """32 bits for each element, a function of its place and of the step alone."""
    index_C = torch.arange(part.start, part.stop, device=device)
    return _mixed((index_C + step * 0x9E3779B9) ^ ((index_C >> 32) * 0x27D4EB2F) & _WORD)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finalizer, on 32-bit words in int64."""
    bits = bits & _WORD
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _WORD
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _WORD
    return bits ^ (bits >> 16)


def _rounded(values: torch.Tensor, dtype: torch.dtype, noise16: torch.Tensor) -> torch.Tensor:
    """`values` in `dtype`; in bf16 up or down with the odds of their distances, by the 16 bits of `noise16`."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    bits = values.float().view(torch.int32) + noise16.to(torch.int32)
    rounded = (bits & -0x10000).view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def _decoded(codes_C: torch.Tensor, absmax_B: torch.Tensor, code_map: torch.Tensor) -> torch.Tensor:
    return code_map[codes_C.long()] * absmax_B.repeat_interleave(QUANTIZATION_BLOCK)[: codes_C.shape[0]]


def _encode(values_C: torch.Tensor, codes_C: torch.Tensor, absmax_B: torch.Tensor, code_map: torch.Tensor) -> None:
    """Writes the code nearest to each value over its block's largest magnitude; a block of zeros gets the code of zero.

    Where the map has no negative values, it holds second moments: one above zero takes no code of zero. A zero there, beside a first moment
    that is none, would divide the next step by eps.
    """
    padding = -values_C.shape[0] % QUANTIZATION_BLOCK
    values_BQ = torch.nn.functional.pad(values_C, (0, padding)).view(-1, QUANTIZATION_BLOCK)
    absmax_B.copy_(values_BQ.abs().amax(dim=1))
    scaled_C = (values_BQ / absmax_B.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).view(-1)[: values_C.shape[0]]
    bounds = (code_map[1:] + code_map[:-1]) / 2
    nearest_C = torch.searchsorted(bounds, scaled_C.contiguous())
    if code_map[0] == 0:
        nearest_C = torch.where(values_C > 0, nearest_C.clamp(min=1), nearest_C)
    codes_C.copy_(nearest_C)
