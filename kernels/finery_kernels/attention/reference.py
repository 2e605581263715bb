"""Attention in plain torch, on any device and dtype: the oracle of the tests, and what runs where no fused backend does.

Works one sequence and one block of queries at a time, so that no more than `SCORES_PER_BLOCK` scores exist at once. Unless all sequences
have one length, their bounds are read on the host, and checked: on a GPU this synchronizes and cannot be captured in a CUDA graph.

Suffixes: T rows of the pack, H query heads, K key-value heads, G = H/K, d head dim, Q queries and N keys of a block, R = G*Q.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from finery_kernels.attention.problem import Problem
from finery_kernels.errors import UnsupportedError

SCORES_PER_BLOCK = 1 << 23


def forward(q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, H, d] in q's dtype and the scores' logsumexp [H, T] (fp32; fp64 for fp64), from arithmetic in the latter's dtype.

    Rows that belong to no sequence get zeros.
    """
    num_rows, num_heads, head_dim = q_THd.shape
    wide = _wide(q_THd.dtype)
    out_THd = torch.zeros(num_rows, num_heads, head_dim, dtype=q_THd.dtype, device=q_THd.device)
    lse_HT = torch.zeros(num_heads, num_rows, dtype=wide, device=q_THd.device)
    for queries, keys in _blocks(problem, num_rows, num_heads):
        scores_KRN, _ = _scores(_by_kv_head(q_THd[queries], k_TKd.shape[1], wide), k_TKd[keys].to(wide), problem, queries, keys)
        lse_KR = torch.logsumexp(scores_KRN, dim=-1)
        probs_KRN = scores_KRN.sub_(lse_KR.unsqueeze(-1)).exp_()
        out_KRd = probs_KRN @ v_TKd[keys].to(wide).transpose(0, 1)
        out_THd[queries] = _by_row(out_KRd, num_heads).to(q_THd.dtype)
        lse_HT[:, queries] = lse_KR.reshape(num_heads, -1)
    return out_THd, lse_HT


def backward(
    dout_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_TKd: torch.Tensor,
    v_TKd: torch.Tensor,
    out_THd: torch.Tensor,
    lse_HT: torch.Tensor,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v in their dtypes, from recomputed probabilities; k's and v's are summed in the wide dtype and rounded once."""
    num_rows, num_heads, _ = q_THd.shape
    num_kv_heads = k_TKd.shape[1]
    wide = lse_HT.dtype
    dq_THd = torch.zeros(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device)
    dk_TKd = torch.zeros(k_TKd.shape, dtype=wide, device=q_THd.device)
    dv_TKd = torch.zeros(v_TKd.shape, dtype=wide, device=q_THd.device)
    for queries, keys in _blocks(problem, num_rows, num_heads):
        q_KRd = _by_kv_head(q_THd[queries], num_kv_heads, wide)
        dout_KRd = _by_kv_head(dout_THd[queries], num_kv_heads, wide)
        delta_KR1 = (dout_KRd * _by_kv_head(out_THd[queries], num_kv_heads, wide)).sum(dim=-1, keepdim=True)
        k_NKd = k_TKd[keys].to(wide)
        scores_KRN, slope_KRN = _scores(q_KRd, k_NKd, problem, queries, keys)
        probs_KRN = scores_KRN.sub_(lse_HT[:, queries].reshape(num_kv_heads, -1, 1)).exp_()
        dv_TKd[keys] += (probs_KRN.transpose(1, 2) @ dout_KRd).transpose(0, 1)
        dprobs_KRN = dout_KRd @ v_TKd[keys].to(wide).permute(1, 2, 0)
        dscores_KRN = dprobs_KRN.sub_(delta_KR1).mul_(probs_KRN)
        if slope_KRN is not None:
            dscores_KRN.mul_(slope_KRN)
        dscores_KRN.mul_(problem.scale)
        dq_THd[queries] = _by_row(dscores_KRN @ k_NKd.transpose(0, 1), num_heads).to(q_THd.dtype)
        dk_TKd[keys] += (dscores_KRN.transpose(1, 2) @ q_KRd).transpose(0, 1)
    return dq_THd, dk_TKd.to(k_TKd.dtype), dv_TKd.to(v_TKd.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bounds(problem: Problem, num_rows: int) -> list[int]:
    if problem.length is not None:
        return list(range(0, num_rows + 1, problem.length))
    assert problem.cu_seqlens_S is not None
    bounds: list[int] = problem.cu_seqlens_S.tolist()
    if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] > num_rows:
        raise UnsupportedError(f"cu_seqlens does not ascend from 0 to at most {num_rows}, the number of rows: {bounds[:20]}")
    if (longest := max(end - start for start, end in itertools.pairwise(bounds))) > problem.max_seqlen:
        raise UnsupportedError(f"cu_seqlens has a sequence of {longest} rows and max_seqlen is {problem.max_seqlen}; no less is wanted.")
    return bounds


def _blocks(problem: Problem, num_rows: int, num_heads: int) -> Iterator[tuple[slice, slice]]:
    """Rows of a block of queries, and of the keys that at least one of them sees."""
    bounds = _bounds(problem, num_rows)
    for start, end in itertools.pairwise(bounds):
        num_keys = min(end - start, problem.window or end - start)
        size = max(1, min(end - start, SCORES_PER_BLOCK // (2 * num_heads * num_keys)) if num_keys else 1)
        for first in range(start, end, size):
            last = min(first + size, end)
            seen_from = start if problem.window is None else max(start, first - problem.window + 1)
            seen_to = end if problem.window is None else min(end, last - 1 + problem.window)
            yield slice(first, last), slice(seen_from, last if problem.causal else seen_to)


def _scores(
    q_KRd: torch.Tensor, k_NKd: torch.Tensor, problem: Problem, queries: slice, keys: slice
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled, capped and masked scores [K, R, N], and the cap's derivative where there is a cap."""
    scores_KRN = (q_KRd @ k_NKd.permute(1, 2, 0)).mul_(problem.scale)
    slope_KRN = None
    if problem.softcap is not None:
        tanh_KRN = scores_KRN.div_(problem.softcap).tanh_()
        slope_KRN = 1 - tanh_KRN.square()
        scores_KRN = tanh_KRN.mul_(problem.softcap)
    hidden_QN = _hidden(problem, queries, keys, scores_KRN.device)
    if hidden_QN is not None:
        scores_KRN.unflatten(1, (-1, hidden_QN.shape[0])).masked_fill_(hidden_QN, float("-inf"))
    return scores_KRN, slope_KRN


def _hidden(problem: Problem, queries: slice, keys: slice, device: torch.device) -> torch.Tensor | None:
    """True where a query does not see a key."""
    if not problem.causal and problem.window is None:
        return None
    ahead_QN = torch.arange(keys.start, keys.stop, device=device) - torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
    if problem.window is None:
        return ahead_QN > 0
    hidden_QN = ahead_QN <= -problem.window
    return hidden_QN.logical_or_(ahead_QN > 0 if problem.causal else ahead_QN >= problem.window)


def _by_kv_head(x_QHd: torch.Tensor, num_kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """[Q, H, d] as [K, G*Q, d]: the queries of one key-value head together."""
    _, num_heads, head_dim = x_QHd.shape
    x_QKGd = x_QHd.to(dtype).unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    return x_QKGd.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)


def _by_row(x_KRd: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[K, G*Q, d] as [Q, H, d]."""
    return x_KRd.reshape(num_heads, -1, x_KRd.shape[-1]).transpose(0, 1)
