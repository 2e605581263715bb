"""LayerNorm in plain torch: any device, any floating-point dtype, arithmetic in fp32 (in fp64 for fp64) and one rounding at the end.

Layer normalization: https://arxiv.org/abs/1607.06450. Trusts its arguments, which `api` has validated.

T: rows, D: columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    sum_TD = x_TD
    if residual_TD is not None:
        sum_TD = _into(residual_out, (x_TD.to(wide) + residual_TD.to(wide)).to(x_TD.dtype))
    mean_T = sum_TD.to(wide).mean(dim=-1)
    centred_TD = sum_TD.to(wide) - mean_T[:, None]
    rstd_T = torch.rsqrt(centred_TD.square().mean(dim=-1) + eps)
    y_TD = centred_TD * rstd_T[:, None]
    if weight_D is not None:
        y_TD = y_TD * (weight_D.to(wide) + offset)
    if bias_D is not None:
        y_TD = y_TD + bias_D.to(wide)
    return _into(out, y_TD.to(x_TD.dtype)), sum_TD, mean_T, rstd_T


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
    wide = torch.promote_types(s_TD.dtype, torch.float32)
    scaled_TD = dy_TD.to(wide)
    normalised_TD = (s_TD.to(wide) - mean_T[:, None]) * rstd_T[:, None]
    if dbias_D is not None:
        dbias_D += scaled_TD.sum(dim=0)
    if dweight_D is not None:
        dweight_D += (scaled_TD * normalised_TD).sum(dim=0)
    if weight_D is not None:
        scaled_TD = scaled_TD * (weight_D.to(wide) + offset)
    projection_T1 = (scaled_TD * normalised_TD).mean(dim=-1, keepdim=True)
    dx_TD = (scaled_TD - scaled_TD.mean(dim=-1, keepdim=True) - normalised_TD * projection_T1) * rstd_T[:, None]
    if dresidual_TD is not None:
        dx_TD = dx_TD + dresidual_TD.to(wide)
    return _into(out, dx_TD.to(s_TD.dtype))


def _into(out: Tensor | None, values_TD: Tensor) -> Tensor:
    return values_TD if out is None else out.copy_(values_TD)
