"""Cross-entropy through the head's weight in plain torch, tile by tile, on any device.

Owns the order of roundings: logits in fp32, their gradient rounded to the dtype of `h`, products of that gradient accumulated in fp32.
Validation and dispatch are in `api`, the CUDA path in `triton`.

Shapes: T rows (tokens), L rows taken through the head, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch

from finery_kernels.cross_entropy import reference as cross_entropy


def linear_cross_entropy_forward_backward(
    h_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_L: torch.Tensor,
    *,
    rows_L: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    grad_scale: torch.Tensor,
    tile_rows: int,
    out_dh: torch.Tensor,
    dweight_VD: torch.Tensor | None,
    ignore_index: int,
) -> torch.Tensor:
    """As `api.linear_cross_entropy_forward_backward`, after validation; fills `out_dh` and returns the summed loss."""
    dtype = torch.promote_types(h_TD.dtype, torch.float32)
    wide_VD = weight_VD.to(dtype)
    loss = torch.zeros((), dtype=dtype, device=h_TD.device)
    if rows_L is not None:
        out_dh.zero_()
    for start in range(0, targets_L.shape[0], tile_rows):
        tile = slice(start, start + tile_rows)
        h_RD = h_TD[tile] if rows_L is None else h_TD[rows_L[tile]]
        logits_RV = h_RD.to(dtype) @ wide_VD.T
        dlogits_RV = torch.empty_like(logits_RV, dtype=h_TD.dtype)
        loss_R = cross_entropy.cross_entropy_forward_backward_(
            logits_RV,
            targets_L[tile],
            softcap=softcap,
            scale=scale,
            grad_scale=grad_scale,
            out=dlogits_RV,
            ignore_index=ignore_index,
        )
        loss = loss + loss_R.sum()
        dlogits_RV = dlogits_RV.to(dtype)
        _put_rows(out_dh, dlogits_RV @ wide_VD, tile=tile, rows_L=rows_L, used_R=targets_L[tile] != ignore_index)
        if dweight_VD is not None:
            dweight_VD.copy_(dweight_VD.to(dtype) + dlogits_RV.T @ h_RD.to(dtype))
    return loss


def _put_rows(out_TD: torch.Tensor, x_RD: torch.Tensor, *, tile: slice, rows_L: torch.Tensor | None, used_R: torch.Tensor) -> None:
    if rows_L is None:
        out_TD[tile] = x_RD.to(out_TD.dtype)
    else:
        out_TD[rows_L[tile][used_R]] = x_RD[used_R].to(out_TD.dtype)
