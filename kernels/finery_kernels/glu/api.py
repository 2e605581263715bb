"""The gated linear unit `f(gate) * up`: checks, dispatch by device and autograd. The arithmetic is in `reference` and `triton`.

Legend: T rows, F width of the activation, N = 2F: a row is [gate | up]. f is SiLU (SwiGLU, arXiv:2002.05202) or GELU (GEGLU), the latter
exact or by the tanh formula. Rows may be wider apart than they are long, so that views `buffer[:, :N]` are taken as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable

from finery_kernels.errors import UnsupportedError
from finery_kernels.glu import reference
from finery_kernels.overlap import check_apart

if TYPE_CHECKING:
    from types import ModuleType

Tensor = torch.Tensor
Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def glu_forward(gate_up_TN: Tensor, *, activation: Activation, out: Tensor | None = None) -> Tensor:
    """`f(gate) * up`, without autograd, computed in fp32 and rounded once.

    Args:
        gate_up_TN: [T, 2F] bf16, fp16 or fp32 (fp64 too off the GPU), unit stride in the last dimension, any row stride >= 2F.
        activation: "silu", "gelu" (exact) or "gelu_tanh".
        out: [T, F] of the same dtype and device, any row stride >= F; may not overlap `gate_up_TN`. Allocated if None.

    Returns:
        act_TF, which is `out` where given.

    Raises:
        UnsupportedError: a shape, dtype, device, stride, overlap or activation that is not taken.
    """
    num_rows, width = _check_inputs(gate_up_TN, activation)
    if out is None:
        out = torch.empty((num_rows, width), dtype=gate_up_TN.dtype, device=gate_up_TN.device)
    else:
        _check_rows("out", out, shape=(num_rows, width), like=gate_up_TN)
        check_apart("out", out, "gate_up_TN", gate_up_TN)
    if not gate_up_TN.is_cuda:
        return reference.glu_forward(gate_up_TN, activation=activation, out=out)
    with torch.cuda.device(gate_up_TN.device):
        return _kernels().glu_forward(gate_up_TN, activation=activation, out=out)


def glu_backward(
    dact_TF: Tensor, gate_up_TN: Tensor, *, activation: Activation, out: Tensor | None = None, act_out: Tensor | None = None
) -> Tensor:
    """The gradient of `glu_forward`, without autograd; on request the activation again, for a weight gradient.

    Args:
        dact_TF: [T, F], dtype and device of `gate_up_TN`, unit stride in the last dimension, any row stride >= F.
        gate_up_TN: [T, 2F], what the forward pass was given.
        activation: as in the forward pass.
        out: [T, 2F] for [dgate | dup]; may be `gate_up_TN` itself, which is then overwritten, and overlaps nothing else. Allocated if None.
        act_out: [T, F] for the recomputed `f(gate) * up`; may be `dact_TF` itself and overlaps nothing else. Not written if None.

    Returns:
        dgate_up_TN, which is `out` where given.

    Raises:
        UnsupportedError: a shape, dtype, device, stride, overlap or activation that is not taken.
    """
    num_rows, width = _check_inputs(gate_up_TN, activation)
    _check_rows("dact_TF", dact_TF, shape=(num_rows, width), like=gate_up_TN)
    if out is None:
        out = torch.empty((num_rows, 2 * width), dtype=gate_up_TN.dtype, device=gate_up_TN.device)
    else:
        _check_rows("out", out, shape=(num_rows, 2 * width), like=gate_up_TN)
        check_apart("out", out, "dact_TF", dact_TF)
        check_apart("out", out, "gate_up_TN", gate_up_TN, may_be_same=True)
    if act_out is not None:
        _check_rows("act_out", act_out, shape=(num_rows, width), like=gate_up_TN)
        check_apart("act_out", act_out, "out", out)
        check_apart("act_out", act_out, "gate_up_TN", gate_up_TN)
        check_apart("act_out", act_out, "dact_TF", dact_TF, may_be_same=True)
    if not gate_up_TN.is_cuda:
        return reference.glu_backward(dact_TF, gate_up_TN, activation=activation, out=out, act_out=act_out)
    with torch.cuda.device(gate_up_TN.device):
        return _kernels().glu_backward(dact_TF, gate_up_TN, activation=activation, out=out, act_out=act_out)


def glu(gate_up: Tensor, *, activation: Activation = "silu") -> Tensor:
    """`f(gate) * up` with autograd. `gate_up` [..., 2F] holds gate and up side by side; returns [..., F] of the same dtype.

    Raises UnsupportedError for a shape, dtype or activation that is not taken. Its gradient has no gradient of its own.
    """
    if gate_up.dim() < 1:
        raise UnsupportedError("gate_up is a scalar; wanted [..., 2F]")
    act_TF: Tensor = _Glu.apply(_rows(gate_up), activation)
    return act_TF.view(*gate_up.shape[:-1], act_TF.shape[-1])


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TN: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_up_TN)
        ctx.activation = activation
        return glu_forward(gate_up_TN, activation=activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dact_TF,) = grad_outputs
        (gate_up_TN,) = ctx.saved_tensors
        return glu_backward(_rows(dact_TF), gate_up_TN, activation=ctx.activation), None


def _rows(x: Tensor) -> Tensor:
    """Two dimensions and a unit stride in the last; a copy only where the strides leave no other way."""
    x_TN = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x_TN if _has_row_layout(x_TN) else x_TN.contiguous()


def _has_row_layout(x_TN: Tensor) -> bool:
    num_rows, width = x_TN.shape
    return (width <= 1 or x_TN.stride(1) == 1) and (num_rows <= 1 or x_TN.stride(0) >= width)


def _check_inputs(gate_up_TN: Tensor, activation: str) -> tuple[int, int]:
    """Rows T and width F."""
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"activation is {activation!r}; wanted one of {', '.join(ACTIVATIONS)}")
    if gate_up_TN.dim() != 2 or gate_up_TN.shape[1] % 2:
        raise UnsupportedError(f"gate_up_TN has shape {tuple(gate_up_TN.shape)}; wanted [T, 2F]")
    if gate_up_TN.dtype not in _DTYPES and (gate_up_TN.is_cuda or gate_up_TN.dtype != torch.float64):
        raise UnsupportedError(f"gate_up_TN is {gate_up_TN.dtype}; wanted bfloat16, float16 or float32 (float64 off the GPU only)")
    num_rows, columns = gate_up_TN.shape
    _check_rows("gate_up_TN", gate_up_TN, shape=(num_rows, columns), like=gate_up_TN)
    return num_rows, columns // 2


def _check_rows(name: str, x: Tensor, *, shape: tuple[int, int], like: Tensor) -> None:
    if tuple(x.shape) != shape:
        raise UnsupportedError(f"{name} has shape {tuple(x.shape)}; wanted {shape}")
    if x.dtype != like.dtype or x.device != like.device:
        raise UnsupportedError(f"{name} is {x.dtype} on {x.device}; wanted {like.dtype} on {like.device}, as gate_up_TN is")
    if not _has_row_layout(x):
        raise UnsupportedError(
            f"{name} has strides {x.stride()}; wanted a unit stride in the last dimension and rows at least {shape[1]} apart"
        )


def _kernels() -> ModuleType:
    """Imported at the first launch: a machine without a GPU needs no Triton."""
    from finery_kernels.glu import triton as kernels

    return kernels
