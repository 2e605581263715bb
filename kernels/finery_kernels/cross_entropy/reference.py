"""Cross-entropy and its gradient in plain torch, on any device and in any floating dtype.

Owns the formulas, written down once and slowly. Validation and dispatch are in `api`, the kernel in `triton`.

Shapes: T rows (tokens), V vocabulary.
"""

from __future__ import annotations

import torch


def cross_entropy_forward_backward_(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    softcap: float | None,
    scale: float,
    grad_scale: torch.Tensor,
    out: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor:
    """As `api.cross_entropy_forward_backward_`, after validation; computes in fp32, or in fp64 where the logits are fp64."""
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    z_TV = logits_TV.to(dtype) * scale
    slope_TV = None
    if softcap is not None:
        tanh_TV = torch.tanh(z_TV / softcap)
        z_TV, slope_TV = softcap * tanh_TV, 1.0 - tanh_TV * tanh_TV
    labelled_T = targets_T != ignore_index
    in_range_T = (targets_T >= 0) & (targets_T < logits_TV.shape[1])
    used_T = labelled_T & in_range_T
    index_T1 = torch.where(used_T, targets_T, torch.zeros_like(targets_T)).unsqueeze(1)

    loss_T = -torch.log_softmax(z_TV, dim=1).gather(1, index_T1).squeeze(1)
    dz_TV = torch.softmax(z_TV, dim=1)
    dz_TV.scatter_add_(1, index_T1, torch.full_like(index_T1, -1, dtype=dtype))
    if slope_TV is not None:
        dz_TV *= slope_TV
    dz_TV *= grad_scale.to(dtype).reshape(()) * scale
    out.copy_(dz_TV.masked_fill_(~used_T.unsqueeze(1), 0.0))
    loss_T = loss_T.masked_fill(~labelled_T, 0.0)
    return loss_T.masked_fill(labelled_T & ~in_range_T, float("nan"))
