"""AdamW over one flat buffer: validates, and hands CUDA tensors to the kernels, any others to the reference.

Owns what is accepted. Leaves schedules, the step count and the layout of the flat buffer to the caller.

Suffixes: N elements of the flat buffer, B blocks of it, G groups.
"""

from __future__ import annotations

from typing import Any

import torch

from finery_kernels.adamw import reference
from finery_kernels.adamw.state import GROUP_BLOCK, QUANTIZATION_BLOCK, Groups, State8bit
from finery_kernels.errors import UnsupportedError

PARAM_DTYPES = (torch.float32, torch.bfloat16)
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16)
SHADOW_DTYPES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def adamw_(
    params_N: torch.Tensor,
    grads_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    exp_avg_sq_N: torch.Tensor,
    *,
    lr: torch.Tensor | float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: torch.Tensor | int,
    clip_coef: torch.Tensor | None = None,
    groups: Groups | None = None,
    shadow_N: torch.Tensor | None = None,
    stochastic_rounding: bool = False,
) -> None:
    """One step of AdamW (arXiv:1711.05101, torch's order of operations) in place, in one launch and without reading from the device.

    params_N: fp32 or bf16, contiguous; fp64 off the GPU. Arithmetic is in fp32 (fp64), with one rounding of each result. Where N is a
        multiple of 16, the kernel moves 16 bytes at a time.
    grads_N: fp32, bf16 or fp16; multiplied by `clip_coef`, 0-dim fp32, where given.
    exp_avg_N, exp_avg_sq_N: both fp32 or both bf16. bf16 moments are rounded up or down at random, with the odds of the distances: to
        nearest, a second moment could not shrink, since 0.1 % of it is less than half a unit of bf16. The randomness is a
        function of place and step, so that runs are bit-equal.
    lr: a 0-dim fp32 tensor on the device where it must change under a CUDA graph, else a float. step: likewise, an integer, 1 at first.
    groups: multiples of `lr` and `weight_decay` by block; None is 1 everywhere.
    shadow_N: bf16 or fp16, overwritten with the new parameters, rounded to nearest.
    stochastic_rounding: of bf16 parameters, which to nearest lose updates under a 500th of their size.

    Raises UnsupportedError.
    """
    for name, tensor in (("exp_avg", exp_avg_N), ("exp_avg_sq", exp_avg_sq_N)):
        _check_flat(name, tensor, params_N, (torch.float64,) if params_N.dtype == torch.float64 else STATE_DTYPES)
    if exp_avg_N.dtype != exp_avg_sq_N.dtype:
        raise UnsupportedError(f"exp_avg is {exp_avg_N.dtype} and exp_avg_sq {exp_avg_sq_N.dtype}; one dtype is wanted.")
    options = _options(
        params_N,
        grads_N,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        clip_coef=clip_coef,
        groups=groups,
        shadow_N=shadow_N,
        stochastic_rounding=stochastic_rounding,
    )
    if params_N.is_cuda:
        from finery_kernels.adamw import triton

        triton.adamw_(params_N, grads_N, exp_avg_N, exp_avg_sq_N, **options)
    else:
        reference.adamw_(params_N, grads_N, exp_avg_N, exp_avg_sq_N, **options)


@torch.no_grad()
def adamw_8bit_(
    params_N: torch.Tensor,
    grads_N: torch.Tensor,
    state: State8bit,
    *,
    lr: torch.Tensor | float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: torch.Tensor | int,
    clip_coef: torch.Tensor | None = None,
    groups: Groups | None = None,
    shadow_N: torch.Tensor | None = None,
    stochastic_rounding: bool = False,
) -> None:
    """One step with both moments in 8 bits (arXiv:2110.02861), as bitsandbytes' AdamW8bit takes it; arguments as in `adamw_`.

    Two things differ: a second moment above zero takes no code of zero, and a value midway between two codes may take the other one.
    Raises UnsupportedError.
    """
    num_blocks = -(-params_N.shape[0] // QUANTIZATION_BLOCK) if params_N.ndim == 1 else 0
    for name, codes_N, absmax_B in (
        ("exp_avg", state.exp_avg_codes_N, state.exp_avg_absmax_B),
        ("exp_avg_sq", state.exp_avg_sq_codes_N, state.exp_avg_sq_absmax_B),
    ):
        _check_flat(f"state.{name}_codes", codes_N, params_N, (torch.uint8,))
        _check_vector(f"state.{name}_absmax", absmax_B, (torch.float32,), num_blocks, params_N.device)
    for name, code_map in (("signed_map", state.signed_map), ("unsigned_map", state.unsigned_map)):
        _check_vector(f"state.{name}", code_map, (torch.float32,), 256, params_N.device)
    if params_N.dtype == torch.float64:
        raise UnsupportedError("params is torch.float64; fp32 or bf16 is wanted beside 8-bit states.")
    options = _options(
        params_N,
        grads_N,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        clip_coef=clip_coef,
        groups=groups,
        shadow_N=shadow_N,
        stochastic_rounding=stochastic_rounding,
    )
    if params_N.is_cuda:
        from finery_kernels.adamw import triton

        triton.adamw_8bit_(params_N, grads_N, state, **options)
    else:
        reference.adamw_8bit_(params_N, grads_N, state, **options)


@torch.no_grad()
def grad_norm(grads_N: torch.Tensor) -> torch.Tensor:
    """L2 norm of the flat buffer [N], fp32, 0-dim, on its device; the same bits every time. Raises UnsupportedError."""
    if grads_N.ndim != 1 or not grads_N.is_contiguous() or grads_N.dtype not in (*GRAD_DTYPES, torch.float64):
        raise UnsupportedError(f"grads is {grads_N.dtype} {tuple(grads_N.shape)}; contiguous fp32, bf16 or fp16 [N] is wanted.")
    if grads_N.is_cuda and grads_N.dtype != torch.float64:
        from finery_kernels.adamw import triton

        return triton.grad_norm(grads_N)
    return reference.grad_norm(grads_N)


@torch.no_grad()
def clip_coefficient(norm: torch.Tensor, *, max_norm: float) -> torch.Tensor:
    """What gradients of that norm are multiplied by to have one of `max_norm` at the most: torch's `clip_grad_norm_`. 0-dim fp32."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _options(params_N: torch.Tensor, grads_N: torch.Tensor, **options: Any) -> dict[str, Any]:
    dtypes = PARAM_DTYPES if params_N.is_cuda else (*PARAM_DTYPES, torch.float64)
    _check_flat("params", params_N, params_N, dtypes)
    _check_flat("grads", grads_N, params_N, GRAD_DTYPES if params_N.dtype != torch.float64 else (*GRAD_DTYPES, torch.float64))
    if options["shadow_N"] is not None:
        _check_flat("shadow", options["shadow_N"], params_N, SHADOW_DTYPES)
    if options["stochastic_rounding"] and params_N.dtype != torch.bfloat16:
        raise UnsupportedError(f"stochastic_rounding with params of {params_N.dtype}; torch.bfloat16 is wanted for it.")
    for beta in ("beta1", "beta2"):
        if not 0 <= options[beta] < 1:
            raise UnsupportedError(f"{beta} is {options[beta]}; 0 or more and less than 1 is wanted.")
    _check_scalar("lr", options["lr"], (torch.float32,), params_N.device)
    _check_scalar("clip_coef", options["clip_coef"], (torch.float32,), params_N.device)
    _check_scalar("step", options["step"], (torch.int32, torch.int64), params_N.device)
    if isinstance(options["step"], int) and options["step"] < 1:
        raise UnsupportedError(f"step is {options['step']}; 1 or more is wanted.")
    if (groups := options["groups"]) is not None:
        _check_groups(groups, params_N)
    return options


def _check_groups(groups: Groups, params_N: torch.Tensor) -> None:
    num_blocks, num_groups = -(-params_N.shape[0] // GROUP_BLOCK), groups.lr_scale_G.shape[0]
    _check_vector("groups.group_of_block", groups.group_of_block_B, (torch.uint8,), num_blocks, params_N.device)
    for name, scale_G in (("lr_scale", groups.lr_scale_G), ("decay_scale", groups.decay_scale_G)):
        _check_vector(f"groups.{name}", scale_G, (torch.float32,), num_groups, params_N.device)


def _check_flat(name: str, tensor: torch.Tensor, params_N: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if params_N.ndim != 1:
        raise UnsupportedError(f"params has shape {tuple(params_N.shape)}; a flat buffer [N] is wanted.")
    _check_vector(name, tensor, dtypes, params_N.shape[0], params_N.device)


def _check_vector(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], size: int, device: torch.device) -> None:
    if tensor.shape != (size,) or tensor.dtype not in dtypes or tensor.device != device or not tensor.is_contiguous():
        raise UnsupportedError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; "
            f"contiguous {' or '.join(map(str, dtypes))} of shape ({size},) on {device} is wanted."
        )


def _check_scalar(name: str, value: torch.Tensor | float | None, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if isinstance(value, torch.Tensor) and (value.ndim != 0 or value.dtype not in dtypes or value.device != device):
        raise UnsupportedError(
            f"{name} is {value.dtype} {tuple(value.shape)} on {value.device}; 0-dim {' or '.join(map(str, dtypes))} on {device} is wanted."
        )
