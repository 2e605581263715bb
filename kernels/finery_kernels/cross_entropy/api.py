"""Cross-entropy with its gradient: what callers use.

Owns validation, dispatch by device and autograd. The arithmetic is in `reference` (any device) and `triton` (CUDA); the product with the
head's weight is `finery_kernels.linear_cross_entropy`.

Shapes: T rows (tokens), V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from finery_kernels.cross_entropy import reference
from finery_kernels.errors import UnsupportedError

Reduction = Literal["sum", "mean"]

_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ANY_DTYPES = (*_CUDA_DTYPES, torch.float64)
# The kernel counts columns in 32 bits, and a step of them past the last.
MAX_CLASSES = 2**30


@torch.no_grad()
def cross_entropy_forward_backward_(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    grad_scale: torch.Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Loss of every row and the gradient of the logits, in one call without a host sync.

    With z = scale * logits, then z = softcap * tanh(z / softcap) where a softcap is given, a row's loss is logsumexp(z) - z[target].

    Args:
        logits_TV: [T, V], fp32, bf16 or fp16 (fp64 too, not on CUDA), unit stride in V, any row stride.
        targets_T: [T], int64. A row whose target is `ignore_index` has loss 0 and gradient 0. A target outside of [0, V) makes its row's
            loss NaN and the gradient 0: nothing here may wait for the device to raise.
        grad_scale: one fp32 element on the logits' device; the gradient written is grad_scale * d(loss)/d(logits).
        softcap: bound of the logits' magnitude, or None.
        scale: multiplier of the logits, before the softcap.
        out: [T, V], takes the gradient. None: the gradient replaces the logits, in their dtype. It may be the logits themselves, or, for
            fp32 logits and a 16-bit gradient, the upper half of their own rows (`logits.view(torch.bfloat16)[:, V:]`); no other overlap.
        ignore_index: target of rows without a label.

    Returns:
        loss_T, [T] fp32 (fp64 for fp64 logits).

    Raises:
        UnsupportedError: a tensor's shape, dtype, device, stride or overlap is not as above.
    """
    out = logits_TV if out is None else out
    _check(logits_TV, targets_T, grad_scale=grad_scale, out=out)
    check_numbers(softcap=softcap, scale=scale)
    if logits_TV.device.type == "cuda":
        from finery_kernels.cross_entropy import triton

        op = triton.cross_entropy_forward_backward_
    else:
        op = reference.cross_entropy_forward_backward_
    return op(logits_TV, targets_T, softcap=softcap, scale=scale, grad_scale=grad_scale, out=out, ignore_index=ignore_index)


def cross_entropy(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """The summed or mean loss of the labelled rows, with autograd; the gradient is computed in forward.

    Arguments as in `cross_entropy_forward_backward_`. The mean is over rows with a label. Waits once for the device,
    to look at the targets.

    Returns:
        A 0-dim tensor, fp32 (fp64 for fp64 logits).

    Raises:
        UnsupportedError: an input is not supported, a target lies outside of the vocabulary, or there is no label to take the mean of.
    """
    check_targets(targets_T, num_classes=_num_classes(logits_TV), ignore_index=ignore_index, reduction=reduction)
    loss: torch.Tensor = _CrossEntropy.apply(logits_TV, targets_T, softcap, scale, reduction, ignore_index)
    return loss


def check_targets(targets_T: torch.Tensor, *, num_classes: int, ignore_index: int, reduction: Reduction) -> None:
    """Raises `UnsupportedError` where a target is neither `ignore_index` nor in [0, num_classes), or a mean has no label; waits once."""
    if reduction not in ("sum", "mean"):
        raise UnsupportedError(f"reduction is {reduction!r}; wanted 'sum' or 'mean'")
    labelled_T = targets_T != ignore_index
    wrong_T = labelled_T & ((targets_T < 0) | (targets_T >= num_classes))
    is_wrong, is_labelled = torch.stack((wrong_T.any(), labelled_T.any())).tolist()
    if is_wrong:
        row = int(wrong_T.nonzero()[0, 0])
        raise UnsupportedError(
            f"targets: row {row} has target {int(targets_T[row])}; wanted 0 to {num_classes - 1} (the vocabulary has "
            f"{num_classes} entries) or ignore_index {ignore_index}"
        )
    if reduction == "mean" and not is_labelled:
        raise UnsupportedError(
            f"targets: none of {targets_T.numel()} rows has a label, all are ignore_index {ignore_index}; "
            "wanted at least one for a mean, or reduction 'sum'"
        )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        targets_T: torch.Tensor,
        softcap: float | None,
        scale: float,
        reduction: Reduction,
        ignore_index: int,
    ) -> torch.Tensor:
        """Loss, and the gradient for an upstream gradient of one, kept for backward."""
        share = reduction_scale(targets_T, reduction=reduction, ignore_index=ignore_index, dtype=logits_TV.dtype)
        grad_scale, later = gradient_scales(share, dtype=logits_TV.dtype)
        dlogits_TV = torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
        loss_T = cross_entropy_forward_backward_(
            logits_TV, targets_T, softcap=softcap, scale=scale, grad_scale=grad_scale, out=dlogits_TV, ignore_index=ignore_index
        )
        ctx.save_for_backward(dlogits_TV, later)
        return loss_T.sum() * share.to(loss_T.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """The kept gradient times the upstream one."""
        dlogits_TV, later = ctx.saved_tensors
        upstream = grad_outputs[0] if later is None else grad_outputs[0] * later
        return (times_upstream(dlogits_TV, upstream), None, None, None, None, None)


def reduction_scale(targets_T: torch.Tensor, *, reduction: Reduction, ignore_index: int, dtype: torch.dtype) -> torch.Tensor:
    """0-dim fp32 (fp64 for an fp64 `dtype`): 1, or 1 over the number of labelled rows; no sync."""
    dtype = torch.promote_types(dtype, torch.float32)
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=targets_T.device)
    return (targets_T != ignore_index).sum().to(dtype).reciprocal()


def gradient_scales(share: torch.Tensor, *, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a gradient of `dtype` is multiplied by as it is computed, and what once the upstream gradient is known.

    fp16 ends at 6e-8: a probability over the number of rows would be lost there before the scale of a scaled loss comes to it.
    """
    return (torch.ones_like(share), share) if dtype == torch.float16 else (share, None)


def check_grad_scale(grad_scale: torch.Tensor, *, dtype: torch.dtype, device: torch.device) -> None:
    """Raises `UnsupportedError` unless it is one fp32 element (fp64 will do for an fp64 `dtype`) on `device`."""
    known = (torch.float32, torch.promote_types(dtype, torch.float32))
    if grad_scale.numel() != 1 or grad_scale.dtype not in known or grad_scale.device != device:
        raise UnsupportedError(
            f"grad_scale is {grad_scale.dtype} {tuple(grad_scale.shape)} on {grad_scale.device}; wanted one float32 element on {device}"
        )


def times_upstream(gradient: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """gradient * upstream (0-dim), multiplied in the wider dtype and rounded once to the gradient's."""
    dtype = torch.promote_types(gradient.dtype, upstream.dtype)
    return torch.mul(gradient.to(dtype), upstream.to(dtype)).to(gradient.dtype)


def _num_classes(logits_TV: torch.Tensor) -> int:
    if logits_TV.dim() != 2:
        raise UnsupportedError(f"logits_TV has shape {tuple(logits_TV.shape)}; wanted [T, V]")
    return logits_TV.shape[1]


def _check(logits_TV: torch.Tensor, targets_T: torch.Tensor, *, grad_scale: torch.Tensor, out: torch.Tensor) -> None:
    num_rows, num_classes = logits_TV.shape[0] if logits_TV.dim() else 0, _num_classes(logits_TV)
    if not 1 <= num_classes <= MAX_CLASSES:
        raise UnsupportedError(f"logits_TV has {num_classes} columns; wanted 1 to {MAX_CLASSES}")
    for name, tensor in (("logits_TV", logits_TV), ("out", out)):
        _check_matrix(name, tensor, shape=(num_rows, num_classes), device=logits_TV.device)
    if targets_T.shape != (num_rows,) or targets_T.dtype != torch.int64 or (num_rows > 1 and targets_T.stride(0) != 1):
        raise UnsupportedError(f"targets_T is {targets_T.dtype} {tuple(targets_T.shape)}; wanted contiguous int64 ({num_rows},)")
    if targets_T.device != logits_TV.device:
        raise UnsupportedError(f"targets_T is on {targets_T.device}; wanted {logits_TV.device}, where logits_TV is")
    check_grad_scale(grad_scale, dtype=logits_TV.dtype, device=logits_TV.device)
    if _overlap(logits_TV, out) and not (is_same_memory(logits_TV, out) or is_upper_half(logits_TV, out)):
        raise UnsupportedError("out overlaps logits_TV; wanted a buffer apart, the logits themselves, or the upper half of their fp32 rows")


def _check_matrix(name: str, x_TV: torch.Tensor, *, shape: tuple[int, int], device: torch.device) -> None:
    dtypes = _CUDA_DTYPES if device.type == "cuda" else _ANY_DTYPES
    if tuple(x_TV.shape) != shape:
        raise UnsupportedError(f"{name} has shape {tuple(x_TV.shape)}; wanted {shape}")
    if x_TV.device != device:
        raise UnsupportedError(f"{name} is on {x_TV.device}; wanted {device}")
    if x_TV.dtype not in dtypes:
        raise UnsupportedError(f"{name} is {x_TV.dtype}; wanted one of {', '.join(str(dtype) for dtype in dtypes)}")
    if (shape[1] > 1 and x_TV.stride(1) != 1) or (shape[0] > 1 and x_TV.stride(0) < shape[1]):
        raise UnsupportedError(f"{name} has strides {x_TV.stride()}; wanted 1 in the last dimension and at least {shape[1]} between rows")


def check_numbers(*, softcap: float | None, scale: float) -> None:
    """Raises `UnsupportedError` for a softcap or a multiplier that makes no sense."""
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise UnsupportedError(f"softcap is {softcap}; wanted a positive finite number or None")
    if not abs(scale) < float("inf") or scale == 0.0:
        raise UnsupportedError(f"scale is {scale}; wanted a finite number other than 0")


def _span_bytes(x_TV: torch.Tensor) -> tuple[int, int]:
    if x_TV.numel() == 0:
        return (0, 0)
    length = (x_TV.shape[0] - 1) * x_TV.stride(0) + x_TV.shape[1]
    return (x_TV.data_ptr(), x_TV.data_ptr() + length * x_TV.element_size())


def _overlap(a_TV: torch.Tensor, b_TV: torch.Tensor) -> bool:
    (a_start, a_end), (b_start, b_end) = _span_bytes(a_TV), _span_bytes(b_TV)
    return a_start < b_end and b_start < a_end


def is_same_memory(logits_TV: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether every element of `out` is the same memory as its logit."""
    return logits_TV.data_ptr() == out.data_ptr() and logits_TV.dtype == out.dtype and logits_TV.stride() == out.stride()


def is_upper_half(logits_TV: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether rows of `out` (2 bytes an element) lie in the logits' own rows (4 bytes an element), no earlier than in their upper half."""
    if (logits_TV.element_size(), out.element_size()) != (4, 2) or out.stride(0) != 2 * logits_TV.stride(0):
        return False
    half_bytes = 2 * logits_TV.shape[1]
    return half_bytes <= out.data_ptr() - logits_TV.data_ptr() <= 4 * logits_TV.stride(0) - half_bytes
