"""Attention within each sequence of a pack: validates, chooses the backend, and joins forward and backward into an autograd function.

Owns the rule which backend computes what (`choose_backend`). The calls are in `backends`, the oracle in `reference`.

Suffixes: T rows of the pack, S sequences, H query heads, K key-value heads, d head dim.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from finery_kernels.attention import backends, reference
from finery_kernels.attention.backends import HALF_DTYPES, HEAD_DIM_MULTIPLE, MAX_CUDNN_HEAD_DIM, MAX_HEAD_DIM, MIN_FLEX_HEAD_DIM
from finery_kernels.attention.problem import Problem
from finery_kernels.errors import UnsupportedError

Backend = Literal["cudnn", "flash", "fa3", "flex", "reference"]

DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)


def choose_backend(
    *,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None = None,
    softcap: float | None = None,
    varlen: bool = False,
    deterministic: bool = False,
    fa3: bool = False,
) -> Backend:
    """The backend that computes a case, by what the case needs alone.

    capability: of the CUDA device, None for any other device. varlen: the sequences' lengths differ or may differ. fa3: whether
    FlashAttention 3 is installed.

    - `reference`: no GPU or one before sm80, fp32 and fp64, head dims over 256 or no multiple of 8, a softcap with head dim 8.
    - `fa3`: where installed, on sm90, for everything but `deterministic`, and except what cuDNN does better: dense without a window.
    - `flex`: softcap.
    - `cudnn`: sequences of one length without a window, head dim up to 128, on sm90 256. Its backward is not deterministic. (The public
      functions count sequences of a single row as `varlen`, since cuDNN's backward does not take them.)
    - `flash`: the rest; its backward has a deterministic mode.
    """
    if capability is None or capability < (8, 0) or dtype not in HALF_DTYPES:
        return "reference"
    if head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE:
        return "reference"
    fa3 = fa3 and capability[0] == 9 and not deterministic
    if softcap is not None:
        return "fa3" if fa3 else "flex" if head_dim >= MIN_FLEX_HEAD_DIM else "reference"
    if not (deterministic or varlen or window is not None) and head_dim <= MAX_CUDNN_HEAD_DIM.get(capability, MAX_CUDNN_HEAD_DIM[None]):
        return "cudnn"
    return "fa3" if fa3 else "flash"


def attention_forward(
    q_THd: torch.Tensor,
    k_TKd: torch.Tensor,
    v_TKd: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    lengths_equal: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, H, d], and the logsumexp in the backend's own form.

    q_THd, k_TKd, v_TKd: bf16, fp16, fp32 or fp64; views with unit last stride, such as the parts of a qkv row. H is a multiple of K.
    cu_seqlens: int32 [S+1] on the tensors' device, from 0 to T: rows past its end come out undefined. Sequences of no rows are
        allowed, so a fixed S can be filled up with T. May be None where `lengths_equal` is set.
    max_seqlen: no sequence is longer. A bound is enough, and should be near: blocks up to it are launched for every sequence.
    lengths_equal: the length of every sequence where all have one; T is a multiple of it. cuDNN builds a plan for each new T and length,
        so it is for shapes that come again.
    scale: of the scores, 1/sqrt(d) unless given. softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118).
    window: keys that a query sees, itself included, on its left and, unless causal, as many on its right.
    backend: None lets `choose_backend` choose. deterministic: the backward gives the same bits every time.

    No rows give no rows. Nothing is read on the host except by the backend `reference` where lengths differ. Raises `UnsupportedError`.
    """
    problem = _problem(
        q_THd,
        k_TKd,
        v_TKd,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        lengths_equal=lengths_equal,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        deterministic=deterministic,
    )
    backend = _resolve(backend, q_THd, problem)
    if not q_THd.shape[0]:
        return torch.empty_like(q_THd), torch.empty(q_THd.shape[1], 0, dtype=lse_dtype(q_THd), device=q_THd.device)
    if backend == "reference":
        return reference.forward(q_THd, k_TKd, v_TKd, problem)
    return backends.forward(backend, q_THd, k_TKd, v_TKd, problem)


def attention_backward(
    dout_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_TKd: torch.Tensor,
    v_TKd: torch.Tensor,
    out_THd: torch.Tensor,
    lse: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    lengths_equal: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq [T, H, d], dk [T, K, d], dv [T, K, d]) in the inputs' dtype, unit last stride.

    Takes what `attention_forward` took and gave, with the same keyword arguments. Output and logsumexp may have been elsewhere meanwhile,
    or come from a forward that was run again. Raises `UnsupportedError`.
    """
    problem = _problem(
        q_THd,
        k_TKd,
        v_TKd,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        lengths_equal=lengths_equal,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        deterministic=deterministic,
    )
    for name, tensor in (("dout", dout_THd), ("out", out_THd)):
        _check_like_q(name, tensor, q_THd)
    if lse.dtype != lse_dtype(q_THd) or lse.device != q_THd.device:
        raise UnsupportedError(
            f"lse is {lse.dtype} on {lse.device}; {lse_dtype(q_THd)} on {q_THd.device} is wanted, as attention_forward gave it."
        )
    backend = _resolve(backend, q_THd, problem)
    if not q_THd.shape[0]:
        return torch.empty_like(q_THd), torch.empty_like(k_TKd), torch.empty_like(v_TKd)
    if backend == "reference":
        return reference.backward(dout_THd, q_THd, k_TKd, v_TKd, out_THd, lse, problem)
    return backends.backward(backend, dout_THd, q_THd, k_TKd, v_TKd, out_THd, lse, problem)


def lse_dtype(q_THd: torch.Tensor) -> torch.dtype:
    """Of the scores' logsumexp, whatever the backend: fp32, and fp64 for fp64."""
    return torch.promote_types(q_THd.dtype, torch.float32)


def attention(
    q_THd: torch.Tensor,
    k_TKd: torch.Tensor,
    v_TKd: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    lengths_equal: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Output [T, H, d], differentiable in q, k and v, once; the arguments are `attention_forward`'s."""
    options = {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "lengths_equal": lengths_equal,
        "scale": scale,
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "backend": backend,
        "deterministic": deterministic,
    }
    return _Attention.apply(q_THd, k_TKd, v_TKd, options)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        out_THd, lse = attention_forward(q_THd, k_TKd, v_TKd, **options)
        ctx.save_for_backward(q_THd, k_TKd, v_TKd, out_THd, lse)
        ctx.options = options
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        (dout_THd,) = grads
        q_THd, k_TKd, v_TKd, out_THd, lse = ctx.saved_tensors
        if not _has_unit_stride(dout_THd):
            dout_THd = dout_THd.contiguous()
        return (*attention_backward(dout_THd, q_THd, k_TKd, v_TKd, out_THd, lse, **ctx.options), None)


def _problem(
    q_THd: torch.Tensor,
    k_TKd: torch.Tensor,
    v_TKd: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    lengths_equal: int | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
) -> Problem:
    _check_tensors(q_THd, k_TKd, v_TKd)
    _check_sequences(cu_seqlens, max_seqlen, lengths_equal, q_THd)
    if window is not None and window < 1:
        raise UnsupportedError(f"window is {window}; at least 1 is wanted, the query's own key.")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise UnsupportedError(f"softcap is {softcap}; a positive finite number or None is wanted.")
    if scale is not None and not abs(scale) < float("inf"):
        raise UnsupportedError(f"scale is {scale}; a finite number or None is wanted.")
    return Problem(
        cu_seqlens_S=cu_seqlens,
        max_seqlen=max_seqlen,
        length=lengths_equal,
        scale=q_THd.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal,
        window=window if window is not None and window < (lengths_equal or max_seqlen) else None,
        softcap=softcap,
        deterministic=deterministic,
    )


def _check_tensors(q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor) -> None:
    for name, tensor in (("q", q_THd), ("k", k_TKd), ("v", v_TKd)):
        if tensor.ndim != 3 or not _has_unit_stride(tensor) or min(tensor.shape[1:]) < 1:
            raise UnsupportedError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; [T, heads, d] with unit last is wanted."
            )
        if tensor.dtype != q_THd.dtype or tensor.dtype not in DTYPES or tensor.device != q_THd.device:
            raise UnsupportedError(
                f"{name} is {tensor.dtype} on {tensor.device}; q's dtype and device ({q_THd.dtype} on {q_THd.device}) are wanted, "
                "and bf16, fp16, fp32 or fp64."
            )
    num_rows, num_heads, head_dim = q_THd.shape
    if k_TKd.shape != v_TKd.shape or k_TKd.shape[0] != num_rows or k_TKd.shape[2] != head_dim:
        raise UnsupportedError(
            f"k is {tuple(k_TKd.shape)} and v {tuple(v_TKd.shape)}; both [{num_rows}, K, {head_dim}] is wanted, as q has it."
        )
    if num_heads % k_TKd.shape[1]:
        raise UnsupportedError(f"q has {num_heads} heads and k {k_TKd.shape[1]}; a multiple of k's is wanted.")


def _has_unit_stride(x_THd: torch.Tensor) -> bool:
    """Whether the last dimension's elements lie side by side, as a single one always does."""
    return x_THd.stride(-1) == 1 or x_THd.shape[-1] == 1 or x_THd.numel() == 0


def _check_sequences(cu_seqlens_S: torch.Tensor | None, max_seqlen: int, length: int | None, q_THd: torch.Tensor) -> None:
    num_rows = q_THd.shape[0]
    if max_seqlen < 1:
        raise UnsupportedError(f"max_seqlen is {max_seqlen}; at least 1 is wanted.")
    if length is not None and (length < 1 or num_rows % length or length > max_seqlen):
        raise UnsupportedError(
            f"lengths_equal is {length} for {num_rows} rows and max_seqlen {max_seqlen}; a divisor up to max_seqlen is wanted."
        )
    if cu_seqlens_S is None:
        if length is None:
            raise UnsupportedError("cu_seqlens is None; it is wanted wherever lengths_equal is not given.")
        return
    if cu_seqlens_S.ndim != 1 or cu_seqlens_S.shape[0] < 2 or cu_seqlens_S.dtype != torch.int32 or not cu_seqlens_S.is_contiguous():
        raise UnsupportedError(
            f"cu_seqlens is {cu_seqlens_S.dtype} of shape {tuple(cu_seqlens_S.shape)}; contiguous int32 [S+1] is wanted."
        )
    if cu_seqlens_S.device != q_THd.device:
        raise UnsupportedError(f"cu_seqlens is on {cu_seqlens_S.device}; q's device, {q_THd.device}, is wanted.")


def _check_like_q(name: str, tensor: torch.Tensor, q_THd: torch.Tensor) -> None:
    if tensor.shape != q_THd.shape or tensor.dtype != q_THd.dtype or tensor.device != q_THd.device or not _has_unit_stride(tensor):
        raise UnsupportedError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; "
            f"{q_THd.dtype} {tuple(q_THd.shape)} with unit last stride on {q_THd.device} is wanted, as q is."
        )


def _resolve(backend: Backend | None, q_THd: torch.Tensor, problem: Problem) -> Backend:
    if not q_THd.is_cuda:
        if backend not in (None, "reference"):
            raise UnsupportedError(f"backend is {backend} and q is on {q_THd.device}; a CUDA tensor is wanted for it, or reference.")
        return "reference"
    if backend == "reference":
        return backend
    if backend is not None:
        backends.check(backend, q_THd, problem)
        return backend
    return choose_backend(
        capability=torch.cuda.get_device_capability(q_THd.device),
        dtype=q_THd.dtype,
        head_dim=q_THd.shape[-1],
        window=problem.window,
        softcap=problem.softcap,
        varlen=problem.length is None or problem.length == 1,
        deterministic=problem.deterministic,
        fa3=backends.fa3_installed(),
    )
