"""Cross-entropy of hidden states through the head's weight: what callers use.

Owns validation, dispatch by device and autograd. Logits exist for one tile of rows at a time and never leave this package; the loss of
given logits is `finery_kernels.cross_entropy`.

Shapes: T rows (tokens), L rows taken through the head, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finery_kernels.cross_entropy.api import (
    MAX_CLASSES,
    Reduction,
    check_grad_scale,
    check_numbers,
    check_targets,
    gradient_scales,
    reduction_scale,
    times_upstream,
)
from finery_kernels.errors import UnsupportedError
from finery_kernels.linear_cross_entropy import reference

_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ANY_DTYPES = (*_CUDA_DTYPES, torch.float64)
# Logits of one tile, where the caller names no tile: 512 MiB in fp32. From there on the head's products gain nothing by more rows.
_TILE_ELEMENTS = 2**27


@torch.no_grad()
def linear_cross_entropy_forward_backward(
    h_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    grad_scale: torch.Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
    tile_rows: int = 1024,
    rows_L: torch.Tensor | None = None,
    out_dh: torch.Tensor | None = None,
    dweight_VD: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and the gradient of the hidden states, by tiles of rows, without a host sync.

    Logits are fp32 (h @ weight.T accumulated and kept in fp32), their gradient is rounded to the dtype of `h`, and so is dh = dlogits @
    weight after accumulation in fp32. On CUDA one tile takes 4 bytes a logit: a 16-bit gradient overwrites the logits it comes from.

    Args:
        h_TD: [T, D], bf16, fp16 or fp32 (fp64 too, not on CUDA), unit stride in D, any row stride.
        weight_VD: [V, D], of the same dtype, unit stride in D.
        targets_T: [T], or [L] beside `rows_L`; int64. Ignored rows have loss 0 and gradient 0; a target outside of [0, V) makes
            the loss NaN.
        grad_scale: one fp32 element on the same device; multiplies the gradients, not the loss.
        softcap: bound of the logits' magnitude (after `scale`), or None.
        scale: multiplier of the logits.
        tile_rows: rows of a tile.
        rows_L: [L], int64: which rows of `h` go through the head; the others get gradient 0. Each at most once, but for pads: any row in
            [0, T) with target `ignore_index`. Not checked, since that would wait for the device.
        out_dh: [T, D] of h's dtype, takes the gradient of `h`; unit stride in D, any row stride; apart from `h`.
        dweight_VD: [V, D], fp32 or of h's dtype: the weight's gradient is added to it, rounding once a tile.
        ignore_index: target of rows without a label.

    Returns:
        (loss, dh): the summed loss, 0-dim fp32 (fp64 for fp64 inputs), and `out_dh`.

    Raises:
        UnsupportedError: a tensor's shape, dtype, device or stride is not as above.
    """
    out_dh = torch.empty(h_TD.shape, dtype=h_TD.dtype, device=h_TD.device) if out_dh is None else out_dh
    _check(h_TD, weight_VD, out_dh=out_dh, dweight_VD=dweight_VD)
    _check_rows(h_TD, targets_T, rows_L=rows_L)
    _check_numbers(h_TD, grad_scale=grad_scale, softcap=softcap, scale=scale, tile_rows=tile_rows)
    if h_TD.device.type == "cuda":
        from finery_kernels.linear_cross_entropy import triton

        op = triton.linear_cross_entropy_forward_backward
    else:
        op = reference.linear_cross_entropy_forward_backward
    loss = op(
        h_TD,
        weight_VD,
        targets_T,
        rows_L=rows_L,
        softcap=softcap,
        scale=scale,
        grad_scale=grad_scale,
        tile_rows=tile_rows,
        out_dh=out_dh,
        dweight_VD=dweight_VD,
        ignore_index=ignore_index,
    )
    return loss, out_dh


def linear_cross_entropy(
    h_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: Reduction = "mean",
    tile_rows: int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The summed or mean loss of the labelled rows, with autograd; the gradients are computed in forward.

    Rows without a label are left out of the products, so the device is waited for. The weight's gradient is computed only where the weight
    requires one, in fp32, and rounded once to its dtype. The mean is over rows with a label.

    Args:
        h_TD: [T, D].
        weight_VD: [V, D].
        targets_T: [T], int64.
        softcap: bound of the logits' magnitude (after `scale`), or None.
        scale: multiplier of the logits.
        reduction: "mean" or "sum".
        tile_rows: rows of a tile; None: as many as make about 512 MiB of logits.
        ignore_index: target of rows without a label.

    Returns:
        A 0-dim tensor, fp32 (fp64 for fp64 inputs).

    Raises:
        UnsupportedError: an input is not supported or does not fit the others, a target lies outside of the vocabulary, or there is no
            label to take the mean of.
    """
    _check_dimensions(h_TD, weight_VD)
    _check_indices("targets_T", targets_T, num_rows=h_TD.shape[0], device=h_TD.device)
    check_targets(targets_T, num_classes=weight_VD.shape[0], ignore_index=ignore_index, reduction=reduction)
    tile_rows = default_tile_rows(weight_VD.shape[0]) if tile_rows is None else tile_rows
    loss: torch.Tensor = _LinearCrossEntropy.apply(h_TD, weight_VD, targets_T, softcap, scale, reduction, tile_rows, ignore_index)
    return loss


def default_tile_rows(num_classes: int) -> int:
    """Rows whose fp32 logits take about 512 MiB: a multiple of 128, from 128 to 8192."""
    return min(max(_TILE_ELEMENTS // max(num_classes, 1) // 128 * 128, 128), 8192)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        softcap: float | None,
        scale: float,
        reduction: Reduction,
        tile_rows: int,
        ignore_index: int,
    ) -> torch.Tensor:
        """Loss, and both gradients for an upstream gradient of one, kept for backward."""
        rows_L = (targets_T != ignore_index).nonzero().squeeze(1)
        share = reduction_scale(targets_T, reduction=reduction, ignore_index=ignore_index, dtype=h_TD.dtype)
        grad_scale, later = gradient_scales(share, dtype=h_TD.dtype)
        wants_dweight = weight_VD.requires_grad
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32)) if wants_dweight else None
        loss, dh_TD = linear_cross_entropy_forward_backward(
            h_TD,
            weight_VD,
            targets_T[rows_L],
            grad_scale=grad_scale,
            softcap=softcap,
            scale=scale,
            tile_rows=tile_rows,
            rows_L=rows_L,
            dweight_VD=dweight_VD,
            ignore_index=ignore_index,
        )
        if dweight_VD is not None:
            dweight_VD = (dweight_VD if later is None else dweight_VD.mul_(later)).to(weight_VD.dtype)
        ctx.save_for_backward(dh_TD, dweight_VD, later)
        return loss * share.to(loss.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """The kept gradients times the upstream one."""
        dh_TD, dweight_VD, later = ctx.saved_tensors
        dh_TD = times_upstream(dh_TD, grad_outputs[0] if later is None else grad_outputs[0] * later)
        dweight_VD = None if dweight_VD is None else times_upstream(dweight_VD, grad_outputs[0])
        return (dh_TD, dweight_VD, None, None, None, None, None, None)


def _check(h_TD: torch.Tensor, weight_VD: torch.Tensor, *, out_dh: torch.Tensor, dweight_VD: torch.Tensor | None) -> None:
    dtypes = _CUDA_DTYPES if h_TD.device.type == "cuda" else _ANY_DTYPES
    if h_TD.dtype not in dtypes:
        raise UnsupportedError(f"h_TD is {h_TD.dtype}; wanted one of {', '.join(str(dtype) for dtype in dtypes)}")
    _check_dimensions(h_TD, weight_VD)
    (num_rows, hidden), num_classes = h_TD.shape, weight_VD.shape[0]
    if not 1 <= num_classes <= MAX_CLASSES:
        raise UnsupportedError(f"weight_VD has {num_classes} rows; wanted 1 to {MAX_CLASSES}")
    _check_matrix("h_TD", h_TD, shape=(num_rows, hidden), dtypes=(h_TD.dtype,), device=h_TD.device)
    _check_matrix("weight_VD", weight_VD, shape=(num_classes, hidden), dtypes=(h_TD.dtype,), device=h_TD.device)
    _check_matrix("out_dh", out_dh, shape=(num_rows, hidden), dtypes=(h_TD.dtype,), device=h_TD.device)
    if dweight_VD is not None:
        dtypes = (torch.promote_types(h_TD.dtype, torch.float32), h_TD.dtype)
        _check_matrix("dweight_VD", dweight_VD, shape=(num_classes, hidden), dtypes=dtypes, device=h_TD.device)


def _check_dimensions(h_TD: torch.Tensor, weight_VD: torch.Tensor) -> None:
    for name, tensor in (("h_TD", h_TD), ("weight_VD", weight_VD)):
        if tensor.dim() != 2:
            raise UnsupportedError(f"{name} has shape {tuple(tensor.shape)}; wanted two dimensions")


def _check_matrix(name: str, x: torch.Tensor, *, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if tuple(x.shape) != shape:
        raise UnsupportedError(f"{name} has shape {tuple(x.shape)}; wanted {shape}")
    if x.dtype not in dtypes:
        raise UnsupportedError(f"{name} is {x.dtype}; wanted {' or '.join(str(dtype) for dtype in dtypes)}")
    if x.device != device:
        raise UnsupportedError(f"{name} is on {x.device}; wanted {device}, where h_TD is")
    if (shape[1] > 1 and x.stride(1) != 1) or (shape[0] > 1 and x.stride(0) < shape[1]):
        raise UnsupportedError(f"{name} has strides {x.stride()}; wanted 1 in the last dimension and at least {shape[1]} between rows")


def _check_rows(h_TD: torch.Tensor, targets_L: torch.Tensor, *, rows_L: torch.Tensor | None) -> None:
    num_rows = h_TD.shape[0] if rows_L is None else rows_L.numel()
    for name, tensor in (("targets_T", targets_L), ("rows_L", rows_L)):
        if tensor is None:
            continue
        _check_indices(name, tensor, num_rows=num_rows, device=h_TD.device)
        if num_rows > 1 and tensor.stride(0) != 1:
            raise UnsupportedError(f"{name} has stride {tensor.stride(0)}; wanted 1")


def _check_indices(name: str, tensor: torch.Tensor, *, num_rows: int, device: torch.device) -> None:
    if tensor.shape != (num_rows,) or tensor.dtype != torch.int64:
        raise UnsupportedError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; wanted int64 ({num_rows},)")
    if tensor.device != device:
        raise UnsupportedError(f"{name} is on {tensor.device}; wanted {device}, where h_TD is")


def _check_numbers(h_TD: torch.Tensor, *, grad_scale: torch.Tensor, softcap: float | None, scale: float, tile_rows: int) -> None:
    check_grad_scale(grad_scale, dtype=h_TD.dtype, device=h_TD.device)
    check_numbers(softcap=softcap, scale=scale)
    if tile_rows < 1:
        raise UnsupportedError(f"tile_rows is {tile_rows}; wanted at least 1")
