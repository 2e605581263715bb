"""Attention's fused backends on a GPU: cuDNN and Flash by torch's own operators, FlashAttention 3 where it is installed, FlexAttention.

Owns how each is called without an autograd graph, which is why torch's private operators are used: the public functions keep
output and logsumexp to themselves. `test_attention` compares their schemas with the ones written down here. Leaves the choice to `api`.

cuDNN is called on sequences of one length only: for packs, `_cudnn_attention_backward` of torch 2.11 takes the longest length from the head
dim, gives gradients of strided views in the wrong places, and builds its plan anew at every call.

Suffixes: T rows of the pack, S sequences, L rows of each, H query heads, K key-value heads, d head dim.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from finery_kernels.attention.problem import Problem
from finery_kernels.errors import UnsupportedError

Forward = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# The arguments that torch 2.11 and 2.13 must both have, as the calls below pass them.
OPERATOR_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "_scaled_dot_product_cudnn_attention": (
        *("query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask"),
        "scale",
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        *("grad_out", "query", "key", "value", "out", "logsumexp", "philox_seed", "philox_offset", "attn_bias"),
        *("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "scale"),
    ),
    "_flash_attention_forward": (
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask"),
        *("scale", "window_size_left", "window_size_right"),
    ),
    "_flash_attention_backward": (
        *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
        *("rng_state", "unused", "scale", "window_size_left", "window_size_right"),
    ),
}


HALF_DTYPES = (torch.bfloat16, torch.float16)
# The fused kernels load 16 bytes at a time.
HEAD_DIM_MULTIPLE = 8
MAX_HEAD_DIM = 256
MIN_FLEX_HEAD_DIM = 16
NUM_FLEX_COMPILATIONS = 64
# By compute capability, None for any other: cuDNN's backward takes 256 on sm90 alone (9.10 and later, as torch 2.11 has it).
MAX_CUDNN_HEAD_DIM: dict[tuple[int, int] | None, int] = {(9, 0): 256, None: 128}

# What FlashAttention 3's forward takes for decoding and fp8.
FA3_ABSENT = (
    *("k_new", "v_new", "q_v", "out", "cu_seqlens_k_new", "page_table", "kv_batch_idx", "leftpad_k"),
    *("rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
)


def forward(backend: str, q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, problem: Problem) -> Forward:
    """Output [T, H, d], contiguous, and the logsumexp in the backend's form."""
    calls: dict[str, Callable[..., Forward]] = {"cudnn": _cudnn, "flash": _flash, "fa3": _fa3, "flex": _flex}
    return calls[backend](q_THd, k_TKd, v_TKd, problem)


def backward(
    backend: str,
    dout_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_TKd: torch.Tensor,
    v_TKd: torch.Tensor,
    out_THd: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
) -> Gradients:
    """Gradients of q, k and v, from what `forward` gave."""
    calls: dict[str, Callable[..., Gradients]] = {
        "cudnn": _cudnn_backward,
        "flash": _flash_backward,
        "fa3": _fa3_backward,
        "flex": _flex_backward,
    }
    # One layout always: cuDNN's plans of torch 2.11 are looked up by the layout of q, k and v alone.
    return calls[backend](dout_THd.contiguous(), q_THd, k_TKd, v_TKd, out_THd.contiguous(), lse, problem)


def check(backend: str, q_THd: torch.Tensor, problem: Problem) -> None:
    """Raises UnsupportedError where `backend`, asked for by name, cannot compute the case."""
    head_dim = q_THd.shape[-1]
    capability = torch.cuda.get_device_capability(q_THd.device) if q_THd.is_cuda else None
    reasons = {
        "flash": problem.softcap is not None and "a softcap",
        "fa3": (problem.deterministic and "determinism") or (not fa3_installed() and "an installation without flash_attn_interface"),
        "flex": head_dim < MIN_FLEX_HEAD_DIM and "a head dim under 16",
        "cudnn": (problem.softcap is not None and "a softcap")
        or (problem.window is not None and "a window")
        or (problem.length is None and "sequences of different lengths")
        or (problem.length == 1 and "sequences of a single row")
        or (problem.deterministic and "determinism")
        or (head_dim > MAX_CUDNN_HEAD_DIM.get(capability, MAX_CUDNN_HEAD_DIM[None]) and f"head dim {head_dim} on this card"),
    }
    if backend not in reasons:
        raise UnsupportedError(f"backend is {backend!r}; one of cudnn, flash, fa3, flex and reference is wanted.")
    if reason := reasons[backend]:
        raise UnsupportedError(f"backend {backend} does not take {reason}; leave the backend unset, or name another.")
    if q_THd.dtype not in HALF_DTYPES or head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"backend {backend} does not take {q_THd.dtype} with head dim {head_dim}; bf16 or fp16, and 8 to 256 by 8, are wanted."
        )


@functools.cache
def fa3_installed() -> bool:
    """Whether FlashAttention 3's package is there; it is not imported."""
    return importlib.util.find_spec("flash_attn_interface") is not None


def _by_sequence(x_THd: torch.Tensor, problem: Problem) -> torch.Tensor:
    """[T, H, d] as a view [S, L, H, d]."""
    assert problem.length is not None
    return x_THd.unflatten(0, (-1, problem.length))


def _cudnn(q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, problem: Problem) -> Forward:
    """Fewer key-value heads than query heads go in as they are."""
    q_SHLd, k_SKLd, v_SKLd = (_by_sequence(x, problem).transpose(1, 2) for x in (q_THd, k_TKd, v_TKd))
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(  # noqa: SLF001
        q_SHLd,
        k_SKLd,
        v_SKLd,
        None,
        True,
        0.0,
        problem.causal,
        False,
        scale=problem.scale,
    )
    out_SHLd, lse = result[0], result[1]
    return out_SHLd.transpose(1, 2).reshape(q_THd.shape).contiguous(), lse


def _cudnn_backward(
    dout_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_TKd: torch.Tensor,
    v_TKd: torch.Tensor,
    out_THd: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
) -> Gradients:
    dout_SHLd, q_SHLd, k_SKLd, v_SKLd, out_SHLd = (
        _by_sequence(x, problem).transpose(1, 2) for x in (dout_THd, q_THd, k_TKd, v_TKd, out_THd)
    )
    no_seed = torch.empty((), dtype=torch.int64, device=q_THd.device)
    dq_SHLd, dk_SKLd, dv_SKLd = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(  # noqa: SLF001
        dout_SHLd,
        q_SHLd,
        k_SKLd,
        v_SKLd,
        out_SHLd,
        lse,
        no_seed,
        no_seed,
        None,
        None,
        None,
        problem.length,
        problem.length,
        0.0,
        problem.causal,
        scale=problem.scale,
    )
    return (
        dq_SHLd.transpose(1, 2).reshape(q_THd.shape),
        dk_SKLd.transpose(1, 2).reshape(k_TKd.shape),
        dv_SKLd.transpose(1, 2).reshape(v_TKd.shape),
    )


def _windows(problem: Problem) -> tuple[int, int]:
    """Keys seen on the left and on the right of a query's own; -1 is all."""
    side = -1 if problem.window is None else problem.window - 1
    return side, 0 if problem.causal else side


def _flash(q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, problem: Problem) -> Forward:
    dense = problem.length is not None
    q, k, v = (_by_sequence(x, problem) if dense else x for x in (q_THd, k_TKd, v_TKd))
    bounds = None if dense else problem.cu_seqlens_S
    longest = problem.length or problem.max_seqlen
    left, right = _windows(problem)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(  # noqa: SLF001
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        0.0,
        problem.causal,
        False,
        scale=problem.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out.reshape(q_THd.shape), lse


def _flash_backward(
    dout_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_TKd: torch.Tensor,
    v_TKd: torch.Tensor,
    out_THd: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
) -> Gradients:
    dense = problem.length is not None
    dout, q, k, v, out = (_by_sequence(x, problem) if dense else x for x in (dout_THd, q_THd, k_TKd, v_TKd, out_THd))
    bounds = None if dense else problem.cu_seqlens_S
    longest = problem.length or problem.max_seqlen
    left, right = _windows(problem)
    # Without dropout nobody reads them.
    no_seed, unused = torch.empty(2, dtype=torch.uint64, device=q_THd.device), torch.empty(0, device=q_THd.device)
    with _determinism() if problem.deterministic else contextlib.nullcontext():
        dq, dk, dv = torch.ops.aten._flash_attention_backward(  # noqa: SLF001
            dout,
            q,
            k,
            v,
            out,
            lse,
            bounds,
            bounds,
            longest,
            longest,
            0.0,
            problem.causal,
            no_seed,
            unused,
            scale=problem.scale,
            window_size_left=left,
            window_size_right=right,
        )
    return dq.reshape(q_THd.shape), dk.reshape(k_TKd.shape), dv.reshape(v_TKd.shape)


@contextlib.contextmanager
def _determinism() -> Iterator[None]:
    """Torch's operator takes its deterministic backward where the process-wide switch is on, and offers no argument for it."""
    enabled, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if enabled and not warn_only:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@functools.cache
def _fa3_operators() -> Any:
    importlib.import_module("flash_attn_interface")
    return torch.ops.flash_attn_3


def _fa3_options(problem: Problem) -> dict[str, Any]:
    """What both operators take. Some releases have no defaults, so that None is named wherever it is meant."""
    left, right = _windows(problem)
    dense = problem.length is not None
    return {
        "cu_seqlens_q": None if dense else problem.cu_seqlens_S,
        "cu_seqlens_k": None if dense else problem.cu_seqlens_S,
        "seqused_q": None,
        "seqused_k": None,
        "max_seqlen_q": None if dense else problem.max_seqlen,
        "max_seqlen_k": None if dense else problem.max_seqlen,
        "softmax_scale": problem.scale,
        "is_causal": problem.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": problem.softcap or 0.0,
    }


def _fa3(q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, problem: Problem) -> Forward:
    q, k, v = (x if problem.length is None else _by_sequence(x, problem) for x in (q_THd, k_TKd, v_TKd))
    absent = dict.fromkeys(FA3_ABSENT)
    # One split: more would be reduced in an order of its own.
    out, lse, *_ = _fa3_operators().fwd(q, k, v, num_splits=1, **absent, **_fa3_options(problem))
    return out.reshape(q_THd.shape), lse


def _fa3_backward(
    dout_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_TKd: torch.Tensor,
    v_TKd: torch.Tensor,
    out_THd: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
) -> Gradients:
    dense = problem.length is not None
    dout, q, k, v, out = (_by_sequence(x, problem) if dense else x for x in (dout_THd, q_THd, k_TKd, v_TKd, out_THd))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _fa3_operators().bwd(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **_fa3_options(problem))
    return dq.reshape(q_THd.shape), dk.reshape(k_TKd.shape), dv.reshape(v_TKd.shape)


def _flex(q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, problem: Problem) -> Forward:
    with torch.no_grad():
        out_1HTd, lse_1HT = _flex_call(q_THd, k_TKd, v_TKd, problem)
    return out_1HTd[0].transpose(0, 1).contiguous(), lse_1HT


def _flex_backward(
    dout_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_TKd: torch.Tensor,
    v_TKd: torch.Tensor,
    out_THd: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
) -> Gradients:
    """Runs the forward again: FlexAttention has its backward behind autograd alone."""
    q, k, v = (x.detach().requires_grad_() for x in (q_THd, k_TKd, v_TKd))
    with torch.enable_grad():
        out_1HTd, _ = _flex_call(q, k, v, problem)
        dq_THd, dk_TKd, dv_TKd = torch.autograd.grad(out_1HTd[0].transpose(0, 1), (q, k, v), dout_THd)
    return dq_THd, dk_TKd, dv_TKd


def _flex_call(q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [1, H, T, d] and logsumexp [1, H, T] of the pack as one long sequence under a mask."""
    from torch.nn.attention.flex_attention import AuxRequest

    q_1HTd, k_1KTd, v_1KTd = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd, k_TKd, v_TKd))
    out_1HTd, aux = _compiled_flex()(
        q_1HTd,
        k_1KTd,
        v_1KTd,
        score_mod=_score_mod(problem.scale, problem.softcap, q_THd.device),
        block_mask=_block_mask(q_THd, problem),
        scale=1.0,
        enable_gqa=q_THd.shape[1] != k_TKd.shape[1],
        # Otherwise packs under 128 rows take a kernel for decoding.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        return_aux=AuxRequest(lse=True),
    )
    return out_1HTd, aux.lse


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """Whole or not at all: run eagerly, FlexAttention would hold the scores of the whole pack.

    torch gives up compiling a function anew after 8 times, all its callers' shapes, dtypes and gradient modes counted together.
    """
    import torch._dynamo.config as dynamo
    from torch.nn.attention.flex_attention import flex_attention

    dynamo.recompile_limit = max(dynamo.recompile_limit, NUM_FLEX_COMPILATIONS)
    return torch.compile(flex_attention, fullgraph=True)


@functools.cache
def _score_mod(scale: float, softcap: float | None, device: torch.device) -> Callable[..., torch.Tensor]:
    """Scale and cap. As tensors: a number that is another one at a later call would become a symbol, which FlexAttention refuses."""
    factor = torch.full((), scale, device=device)
    cap = None if softcap is None else torch.full((), softcap, device=device)

    def scaled(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return score * factor

    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        assert cap is not None
        return cap * torch.tanh(score * factor / cap)

    return scaled if cap is None else capped


def _block_mask(q_THd: torch.Tensor, problem: Problem) -> Any:
    """Which blocks of the pack see which, worked out on the device from the sequences' bounds."""
    from torch.nn.attention.flex_attention import create_block_mask

    num_rows, device = q_THd.shape[0], q_THd.device
    # As a tensor for the same reason; the pack's length is no limit.
    window = torch.full((), problem.window or num_rows, device=device)
    mask_mod = _mask_mod(_sequence_of_row(num_rows, device, problem), window, causal=problem.causal)
    return create_block_mask(mask_mod, None, None, num_rows, num_rows, device=device, _compile=device.type == "cuda")


def _sequence_of_row(num_rows: int, device: torch.device, problem: Problem) -> torch.Tensor:
    row_T = torch.arange(num_rows, device=device, dtype=torch.int32)
    if problem.length is not None:
        return row_T // problem.length
    assert problem.cu_seqlens_S is not None
    return torch.searchsorted(problem.cu_seqlens_S[1:], row_T, right=True, out_int32=True)


def _mask_mod(sequence_T: torch.Tensor, window: torch.Tensor, *, causal: bool) -> Callable[..., torch.Tensor]:
    def seen(_b: torch.Tensor, _h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (sequence_T[query] == sequence_T[key]) & (query - key < window) & (key - query < window)

    def seen_back(_b: torch.Tensor, _h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (sequence_T[query] == sequence_T[key]) & (key <= query) & (query - key < window)

    return seen_back if causal else seen
