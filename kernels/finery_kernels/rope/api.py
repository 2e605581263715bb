"""Rotary position embedding (arXiv:2104.09864) with the RMSNorm over each head that some families put before it: checks, dispatch by
device and autograd. The arithmetic is in `reference` and `triton`.

Legend: T tokens, H query heads, K key and value heads, G = H + K, d head dimension, N = (H + 2K)d, R <= d rotary dimension, P positions
of the tables. A row is [H query heads | K key heads | K value heads]. The first R elements of a head are rotated, element i with element
i + R/2 (transformers' `rotate_half`), the rest passes. `cos_PR` and `sin_PR` are transformers' tables: fp32, contiguous, their halves
equal (only the first is read), an attention scaling already in them. None for both: a layer without rotation. A position
outside the tables gives NaN, since looking would stop the host.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.autograd.function import once_differentiable

from finery_kernels.errors import UnsupportedError
from finery_kernels.overlap import check_apart
from finery_kernels.rope import reference

if TYPE_CHECKING:
    from types import ModuleType

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]
Table = tuple[Tensor, Tensor, Tensor]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rope_qkv_forward_(
    qkv_TN: Tensor,
    cos_PR: Tensor | None,
    sin_PR: Tensor | None,
    positions_T: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    rstd_out: Tensor | None = None,
    pre_out: Tensor | None = None,
) -> Tensor | None:
    """Norms and rotates the queries and keys of every row in place, without autograd; one launch, values untouched.

    Args:
        qkv_TN: [T, (H + 2K)d] bf16, fp16 or fp32 (fp64 too off the GPU), unit stride in the last dimension, any row stride >= N.
        cos_PR, sin_PR: see the module; both None for a layer without rotation.
        positions_T: [T] int32 or int64, contiguous; unused without rotation.
        num_heads, num_kv_heads, head_dim: H, K, d.
        q_norm, k_norm: [d] weights of the norm `x / sqrt(mean(x^2) + eps) * (norm_offset + weight)`, any floating dtype; both or neither.
        eps, norm_offset: of that norm.
        rstd_out: [T, G] fp32, contiguous, for the reciprocal deviations; allocated if None.
        pre_out: [T, Gd], dtype of `qkv_TN`, any row stride: receives the queries and keys as they were, which the backward pass of the
            norm needs; may not overlap `qkv_TN`. Not written if None. Only with the norm.

    Returns:
        rstd_TG with the norm, query heads first; None without.

    Raises:
        UnsupportedError: a shape, dtype, device, stride, overlap or combination that is not taken.
    """
    if head_dim < 2 or head_dim % 2:
        raise UnsupportedError(f"head_dim is {head_dim}; wanted an even number")
    if num_heads < 1 or num_kv_heads < 1:
        raise UnsupportedError(f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}; wanted at least 1 of either")
    if qkv_TN.dim() != 2:
        raise UnsupportedError(f"qkv_TN has shape {tuple(qkv_TN.shape)}; wanted [T, (H + 2K)d]")
    _check_dtype("qkv_TN", qkv_TN)
    _check_rows("qkv_TN", qkv_TN, shape=(qkv_TN.shape[0], (num_heads + 2 * num_kv_heads) * head_dim), like=qkv_TN)
    q_THd, k_TKd, _ = _parts(qkv_TN, num_heads, num_kv_heads, head_dim)
    table = _checked_table(cos_PR, sin_PR, positions_T, like=q_THd)
    weights = _checked_weights(q_norm, k_norm, like=q_THd)
    if weights is None:
        if pre_out is not None or rstd_out is not None:
            raise UnsupportedError("pre_out and rstd_out go with q_norm and k_norm; wanted None for both without a norm")
        if table is not None:
            _run(qkv_TN, "rotate", (q_THd, k_TKd), (q_THd, k_TKd), table, inverse=False)
        return None
    pre = None
    if pre_out is not None:
        _check_rows("pre_out", pre_out, shape=(qkv_TN.shape[0], (num_heads + num_kv_heads) * head_dim), like=qkv_TN)
        check_apart("pre_out", pre_out, "qkv_TN", qkv_TN)
        pre = _parts(pre_out, num_heads, num_kv_heads, head_dim)[:2]
    rstd_TG = _checked_rstd("rstd_out", rstd_out, (q_THd, k_TKd))
    heads = (q_THd, k_TKd)
    _run(qkv_TN, "norm_rotate", heads, heads, weights, table, eps=eps, norm_offset=norm_offset, rstd_TG=rstd_TG, pre=pre)
    return rstd_TG


def rope_qkv_backward(
    dq_THd: Tensor,
    dk_TKd: Tensor,
    dv_TKd: Tensor | None,
    cos_PR: Tensor | None,
    sin_PR: Tensor | None,
    positions_T: Tensor | None,
    *,
    out_TN: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_offset: float = 0.0,
    pre_TN: Tensor | None = None,
    rstd_TG: Tensor | None = None,
    dq_norm: Tensor | None = None,
    dk_norm: Tensor | None = None,
) -> Tensor:
    """The gradient of `rope_qkv_forward_` as one row [dq | dk | dv], without autograd; one launch, the copy of dv in it.

    Args:
        dq_THd, dk_TKd, dv_TKd: gradients by the rotated queries and keys and by the values, unit stride in the last dimension. They may be
            the very views of `out_TN` that the row consists of. dv None: the values' part of `out_TN` is left as it is.
        cos_PR, sin_PR, positions_T, q_norm, k_norm, norm_offset: as in the forward pass.
        out_TN: [T, (H + 2K)d] of their dtype, any row stride >= N. Allocated if None, which wants a dv.
        pre_TN: with the norm: [T, Gd] or [T, N], the row before the forward pass (its values are not read), any row stride.
        rstd_TG: with the norm: what the forward pass returned.
        dq_norm, dk_norm: [d] fp32, contiguous: the weights' gradients are added to them, in the same order every time. Both or neither.

    Returns:
        out_TN.

    Raises:
        UnsupportedError: a shape, dtype, device, stride or combination that is not taken.
    """
    _check_dtype("dq_THd", dq_THd)
    num_tokens, num_heads, head_dim = _check_heads("dq_THd", dq_THd, like=dq_THd)
    _, num_kv_heads, _ = _check_heads("dk_TKd", dk_TKd, like=dq_THd)
    if dv_TKd is not None and _check_heads("dv_TKd", dv_TKd, like=dq_THd)[1] != num_kv_heads:
        raise UnsupportedError(f"dv_TKd has {dv_TKd.shape[1]} heads; wanted {num_kv_heads}, as dk_TKd has")
    width = (num_heads + 2 * num_kv_heads) * head_dim
    if out_TN is None:
        if dv_TKd is None:
            raise UnsupportedError("dv_TKd and out_TN are both None; wanted one of them, as the values' part would be undefined")
        out_TN = torch.empty((num_tokens, width), dtype=dq_THd.dtype, device=dq_THd.device)
    _check_rows("out_TN", out_TN, shape=(num_tokens, width), like=dq_THd)
    gradients, targets = (dq_THd, dk_TKd), _parts(out_TN, num_heads, num_kv_heads, head_dim)
    if dv_TKd is None or dv_TKd.data_ptr() == targets[2].data_ptr():
        targets = targets[:2]
    else:
        gradients = (dq_THd, dk_TKd, dv_TKd)
    table = _checked_table(cos_PR, sin_PR, positions_T, like=dq_THd)
    weights = _checked_weights(q_norm, k_norm, like=dq_THd)
    if weights is None:
        _run(dq_THd, "rotate", gradients, targets, table, inverse=True)
        return out_TN
    pre = _checked_pre(pre_TN, gradients)
    if rstd_TG is None:
        raise UnsupportedError("rstd_TG is None; wanted what the forward pass with a norm returned")
    options = {"norm_offset": norm_offset, "rstd_TG": _checked_rstd("rstd_TG", rstd_TG, gradients)}
    dweights = _checked_dweights(dq_norm, dk_norm, like=dq_THd)
    _run(dq_THd, "norm_rotate_backward", gradients, pre, targets, weights, table, dweights=dweights, **options)
    return out_TN


def rope(q: Tensor, k: Tensor, cos_PR: Tensor, sin_PR: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated copies of `q` [..., H, d] and `k` [..., K, d], with autograd; one launch for both, each way.

    `positions` has the shape of the leading dimensions or expands to it; transformers' [B, H, T, d] is passed as `q.transpose(1, 2)`. The
    tables get no gradient. Raises UnsupportedError for shapes and dtypes that are not taken.
    """
    return cast("tuple[Tensor, Tensor]", _Rope.apply(q, k, cos_PR, sin_PR, positions))


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos_PR: Tensor | None,
    sin_PR: Tensor | None,
    positions: Tensor | None,
    *,
    eps: float,
    norm_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over each head, times `norm_offset + weight`, then `rope`; with autograd for `q`, `k` and both weights.

    Shapes as in `rope`; the weights are [d]. No tables: the norm alone. Raises UnsupportedError for shapes and dtypes that are not taken.
    """
    return cast("tuple[Tensor, Tensor]", _QkNormRope.apply(q, k, q_norm, k_norm, cos_PR, sin_PR, positions, eps, norm_offset))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos_PR: Tensor, sin_PR: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        heads = _flat_heads(q, k)
        table = _checked_table(cos_PR, sin_PR, _flat_positions(positions, q), like=heads[0])
        if table is None:
            raise UnsupportedError("cos_PR and sin_PR are None; wanted the tables to rotate by")
        ctx.save_for_backward(*table)
        targets = _empty_like(heads)
        _run(q, "rotate", heads, targets, table, inverse=False)
        return targets[0].view(q.shape), targets[1].view(k.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk = grad_outputs
        gradients = _flat_heads(dq, dk)
        targets = _empty_like(gradients)
        _run(dq, "rotate", gradients, targets, ctx.saved_tensors, inverse=True)
        return targets[0].view(dq.shape), targets[1].view(dk.shape), None, None, None


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        cos_PR: Tensor | None,
        sin_PR: Tensor | None,
        positions: Tensor | None,
        eps: float,
        norm_offset: float,
    ) -> tuple[Tensor, Tensor]:
        heads = _flat_heads(q, k)
        table = _checked_table(cos_PR, sin_PR, None if positions is None else _flat_positions(positions, q), like=heads[0])
        weights = _checked_weights(q_norm, k_norm, like=heads[0])
        if weights is None:
            raise UnsupportedError("q_norm and k_norm are None; wanted both weights of the norm, or `rope` without a norm")
        rstd_TG, targets = _checked_rstd("rstd_TG", None, heads), _empty_like(heads)
        _run(q, "norm_rotate", heads, targets, weights, table, eps=eps, norm_offset=norm_offset, rstd_TG=rstd_TG)
        ctx.save_for_backward(*heads, *weights, rstd_TG, *(table or ()))
        ctx.norm_offset = norm_offset
        return targets[0].view(q.shape), targets[1].view(k.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk = grad_outputs
        q_THd, k_TKd, q_norm, k_norm, rstd_TG, *table = ctx.saved_tensors
        gradients, dweights = _flat_heads(dq, dk), None
        targets = _empty_like(gradients)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            dweights = tuple(torch.zeros_like(weight, dtype=rstd_TG.dtype) for weight in (q_norm, k_norm))
        options = {"norm_offset": ctx.norm_offset, "rstd_TG": rstd_TG, "dweights": dweights}
        _run(dq, "norm_rotate_backward", gradients, (q_THd, k_TKd), targets, (q_norm, k_norm), tuple(table) or None, **options)
        dq_norm, dk_norm = (None, None) if dweights is None else (dweights[0].to(q_norm.dtype), dweights[1].to(k_norm.dtype))
        return targets[0].view(dq.shape), targets[1].view(dk.shape), dq_norm, dk_norm, None, None, None, None, None


def _run(x: Tensor, name: str, *args: object, **options: object) -> None:
    """The kernel on a GPU, the reference elsewhere. Triton is imported at the first launch: other machines do without."""
    if not x.is_cuda:
        getattr(reference, name)(*args, **options)
        return
    with torch.cuda.device(x.device):
        getattr(_kernels(), name)(*args, **options)


def _kernels() -> ModuleType:
    from finery_kernels.rope import triton as kernels

    return kernels


def _parts(rows_TN: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values of the rows, as views; values are empty where the rows end with the keys."""
    q_end, k_end = num_heads * head_dim, (num_heads + num_kv_heads) * head_dim
    q_TM, k_TM, v_TM = rows_TN[:, :q_end], rows_TN[:, q_end:k_end], rows_TN[:, k_end : k_end + num_kv_heads * head_dim]
    return q_TM.unflatten(1, (-1, head_dim)), k_TM.unflatten(1, (-1, head_dim)), v_TM.unflatten(1, (-1, head_dim))


def _flat_heads(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H, d] and [T, K, d] with a unit stride in the last dimension, copied only where the strides leave no other way."""
    if q.dim() < 3 or k.dim() != q.dim() or q.shape[:-2] != k.shape[:-2]:
        raise UnsupportedError(f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}; wanted [..., H, d] and [..., K, d]")
    flat = tuple(x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) for x in (q, k))
    q_THd, k_TKd = (x if x.stride(-1) == 1 else x.contiguous() for x in flat)
    _check_dtype("q", q_THd)
    _check_heads("q", q_THd, like=q_THd)
    _check_heads("k", k_TKd, like=q_THd)
    return q_THd, k_TKd


def _flat_positions(positions: Tensor, q: Tensor) -> Tensor:
    leading = q.shape[:-2]
    fits = positions.dim() <= len(leading) and all(n in (1, size) for n, size in zip(positions.shape[::-1], leading[::-1], strict=False))
    if not fits:
        raise UnsupportedError(f"positions has shape {tuple(positions.shape)}; wanted {tuple(leading)}, or what expands to it")
    return positions.expand(leading).reshape(-1)


def _empty_like(heads: Tensors) -> tuple[Tensor, Tensor]:
    q_THd, k_TKd = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in heads)
    return q_THd, k_TKd


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES and (x.is_cuda or x.dtype != torch.float64):
        raise UnsupportedError(f"{name} is {x.dtype}; wanted bfloat16, float16 or float32 (float64 off the GPU only)")


def _check_same(name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device:
        raise UnsupportedError(f"{name} is {x.dtype} on {x.device}; wanted {like.dtype} on {like.device}")


def _check_rows(name: str, x: Tensor, *, shape: tuple[int, int], like: Tensor) -> None:
    if tuple(x.shape) != shape:
        raise UnsupportedError(f"{name} has shape {tuple(x.shape)}; wanted {shape}")
    _check_same(name, x, like)
    if x.stride(1) != 1 or (x.shape[0] > 1 and x.stride(0) < shape[1]):
        raise UnsupportedError(
            f"{name} has strides {x.stride()}; wanted a unit stride in the last dimension and rows at least {shape[1]} apart"
        )


def _check_heads(name: str, x: Tensor, *, like: Tensor) -> tuple[int, int, int]:
    if x.dim() != 3 or x.shape[0] != like.shape[0] or x.shape[2] != like.shape[2] or x.shape[2] % 2 or not x.shape[1] * x.shape[2]:
        wanted = "[tokens, heads, d]" if like.dim() != 3 else f"[{like.shape[0]} tokens, heads, {like.shape[2]}]"
        raise UnsupportedError(f"{name} has shape {tuple(x.shape)}; wanted {wanted}, at least one head and the last even")
    _check_same(name, x, like)
    if x.stride(2) != 1:
        raise UnsupportedError(f"{name} has strides {x.stride()}; wanted a unit stride in the last dimension")
    num_tokens, num_heads, head_dim = x.shape
    return num_tokens, num_heads, head_dim


def _checked_table(cos_PR: Tensor | None, sin_PR: Tensor | None, positions_T: Tensor | None, *, like: Tensor) -> Table | None:
    if cos_PR is None and sin_PR is None:
        return None
    if cos_PR is None or sin_PR is None or positions_T is None:
        raise UnsupportedError("of cos_PR, sin_PR and positions_T some are None; wanted all three, or neither cos_PR nor sin_PR")
    head_dim, dtype = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
    for name, table_PR in (("cos_PR", cos_PR), ("sin_PR", sin_PR)):
        if table_PR.dim() != 2 or table_PR.shape != cos_PR.shape or not 0 < table_PR.shape[1] <= head_dim or table_PR.shape[1] % 2:
            raise UnsupportedError(
                f"{name} has shape {tuple(table_PR.shape)}; wanted [P, R], R even and at most {head_dim}, the same for both"
            )
        if table_PR.dtype != dtype or table_PR.device != like.device or not table_PR.is_contiguous() or not table_PR.shape[0]:
            got = f"{table_PR.dtype} on {table_PR.device} with strides {table_PR.stride()}"
            raise UnsupportedError(f"{name} is {got}; wanted {dtype} on {like.device}, contiguous and not empty")
    if positions_T.shape != like.shape[:1] or positions_T.dtype not in (torch.int32, torch.int64) or positions_T.device != like.device:
        got = f"{positions_T.dtype} of shape {tuple(positions_T.shape)} on {positions_T.device}"
        raise UnsupportedError(f"positions_T is {got}; wanted int32 or int64 of shape {tuple(like.shape[:1])} on {like.device}")
    if not positions_T.is_contiguous():
        raise UnsupportedError(f"positions_T has stride {positions_T.stride(0)}; wanted 1")
    return cos_PR, sin_PR, positions_T


def _checked_weights(q_norm: Tensor | None, k_norm: Tensor | None, *, like: Tensor) -> tuple[Tensor, Tensor] | None:
    if q_norm is None and k_norm is None:
        return None
    if q_norm is None or k_norm is None:
        raise UnsupportedError("one of q_norm and k_norm is None; wanted both or neither")
    for name, weight_d in (("q_norm", q_norm), ("k_norm", k_norm)):
        _check_vector(name, weight_d, like=like)
        if not weight_d.is_floating_point():
            raise UnsupportedError(f"{name} is {weight_d.dtype}; wanted a floating dtype")
    return q_norm, k_norm


def _checked_dweights(dq_norm: Tensor | None, dk_norm: Tensor | None, *, like: Tensor) -> tuple[Tensor, Tensor] | None:
    if dq_norm is None and dk_norm is None:
        return None
    if dq_norm is None or dk_norm is None:
        raise UnsupportedError("one of dq_norm and dk_norm is None; wanted both or neither")
    dtype = torch.promote_types(like.dtype, torch.float32)
    for name, dweight_d in (("dq_norm", dq_norm), ("dk_norm", dk_norm)):
        _check_vector(name, dweight_d, like=like)
        if dweight_d.dtype != dtype:
            raise UnsupportedError(f"{name} is {dweight_d.dtype}; wanted {dtype}")
    return dq_norm, dk_norm


def _check_vector(name: str, x_d: Tensor, *, like: Tensor) -> None:
    if x_d.shape != like.shape[-1:] or x_d.device != like.device or not x_d.is_contiguous():
        got = f"shape {tuple(x_d.shape)} on {x_d.device} with strides {x_d.stride()}"
        raise UnsupportedError(f"{name} has {got}; wanted {tuple(like.shape[-1:])} on {like.device}, contiguous")


def _checked_rstd(name: str, rstd_TG: Tensor | None, heads: Tensors) -> Tensor:
    shape, dtype = (heads[0].shape[0], heads[0].shape[1] + heads[1].shape[1]), torch.promote_types(heads[0].dtype, torch.float32)
    if rstd_TG is None:
        return torch.empty(shape, dtype=dtype, device=heads[0].device)
    if tuple(rstd_TG.shape) != shape or rstd_TG.dtype != dtype or rstd_TG.device != heads[0].device or not rstd_TG.is_contiguous():
        got = f"{rstd_TG.dtype} of shape {tuple(rstd_TG.shape)} on {rstd_TG.device} with strides {rstd_TG.stride()}"
        raise UnsupportedError(f"{name} is {got}; wanted {dtype} of shape {shape} on {heads[0].device}, contiguous")
    return rstd_TG


def _checked_pre(pre_TN: Tensor | None, heads: Tensors) -> tuple[Tensor, Tensor]:
    (num_tokens, num_heads, head_dim), num_kv_heads = heads[0].shape, heads[1].shape[1]
    widths = ((num_heads + num_kv_heads) * head_dim, (num_heads + 2 * num_kv_heads) * head_dim)
    if pre_TN is None or pre_TN.dim() != 2 or pre_TN.shape[1] not in widths:
        got = None if pre_TN is None else tuple(pre_TN.shape)
        raise UnsupportedError(f"pre_TN has shape {got}; wanted [{num_tokens}, {widths[0]} or {widths[1]}], since there is a norm")
    _check_rows("pre_TN", pre_TN, shape=(num_tokens, pre_TN.shape[1]), like=heads[0])
    return _parts(pre_TN, num_heads, num_kv_heads, head_dim)[:2]
