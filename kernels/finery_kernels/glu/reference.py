"""The gated linear unit in plain torch, on any device; what the kernel must agree with. Shapes are checked by `api`.

Legend: T rows, F width of the activation, N = 2F with the gate first. Arithmetic in fp32 (fp64 stays fp64), one rounding at the end.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

Tensor = torch.Tensor

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


@torch.no_grad()
def glu_forward(gate_up_TN: Tensor, *, activation: str, out: Tensor) -> Tensor:
    """Writes `f(gate) * up` to `out` [T, F]."""
    gate_TF, up_TF = _widened(gate_up_TN).chunk(2, dim=-1)
    return out.copy_(_activated(gate_TF, activation) * up_TF)


@torch.no_grad()
def glu_backward(dact_TF: Tensor, gate_up_TN: Tensor, *, activation: str, out: Tensor, act_out: Tensor | None = None) -> Tensor:
    """Writes `[dact * up * f'(gate) | dact * f(gate)]` to `out` [T, 2F] and, where asked, `f(gate) * up` to `act_out` [T, F]."""
    gate_TF, up_TF = _widened(gate_up_TN).chunk(2, dim=-1)
    wide_dact_TF = _widened(dact_TF)
    activated_TF = _activated(gate_TF, activation)
    dgate_up_TN = torch.cat((wide_dact_TF * up_TF * _slope(gate_TF, activation), wide_dact_TF * activated_TF), dim=-1)
    if act_out is not None:
        act_out.copy_(activated_TF * up_TF)
    return out.copy_(dgate_up_TN)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _activated(gate_TF: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.silu(gate_TF)
    return functional.gelu(gate_TF, approximate="tanh" if activation == "gelu_tanh" else "none")


def _slope(gate_TF: Tensor, activation: str) -> Tensor:
    """f'(gate)."""
    if activation == "silu":
        s_TF = torch.sigmoid(gate_TF)
        return s_TF * (1.0 + gate_TF * (1.0 - s_TF))
    if activation == "gelu":
        density_TF = torch.exp(-0.5 * gate_TF * gate_TF) / math.sqrt(2.0 * math.pi)
        return 0.5 * (1.0 + torch.erf(gate_TF / math.sqrt(2.0))) + gate_TF * density_TF
    tanh_TF = torch.tanh(_SQRT_2_OVER_PI * (gate_TF + _GELU_CUBIC * gate_TF**3))
    inner_slope_TF = _SQRT_2_OVER_PI * (1.0 + 3.0 * _GELU_CUBIC * gate_TF * gate_TF)
    return 0.5 * (1.0 + tanh_TF) + 0.5 * gate_TF * (1.0 - tanh_TF * tanh_TF) * inner_slope_TF
