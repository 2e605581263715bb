"""Attention against fp64: the reference on any device, every fused backend on a GPU, packs of uneven and of equal sequences."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import pytest
import torch

from finery_kernels import attention as op
from finery_kernels.attention import backends, reference
from finery_kernels.attention.problem import Problem
from finery_kernels.errors import UnsupportedError
from finery_kernels.testing import assert_within_budget, random_normal

# A sequence of one row, ones of no rows, as a fixed number of sequences is filled up with, and lengths on both sides of a block's.
UNEVEN = (5, 1, 0, 17, 0, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention; `equal` says that the lengths are, so that the pack is dense."""

    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    equal: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def bounds(self) -> list[int]:
        return [0, *itertools.accumulate(self.lengths)]

    def options(self, device) -> dict[str, Any]:
        return {
            "cu_seqlens": torch.tensor(self.bounds, dtype=torch.int32, device=device),
            "max_seqlen": max(self.lengths) + 3,
            "lengths_equal": self.lengths[0] if self.equal else None,
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
        }

    def draw(self, device="cpu", seed=0):
        """q, k, v as views of one wider row, as the engine has them, and a gradient of the output."""
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        row = random_normal(self.bounds[-1], width + 64, seed=seed, dtype=self.dtype, device=device)[:, :width]
        parts = row.unflatten(1, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        dout = random_normal(self.bounds[-1], self.heads, self.head_dim, seed=seed + 1, dtype=self.dtype, device=device)
        return (*parts, dout)


def eager(case, q, k, v, dout, dtype):
    """Plain torch in `dtype`, sequence by sequence, every operation rounding: out, dq, dk, dv. In fp64 this is the oracle."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    group = case.heads // case.kv_heads
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    outs = []
    for start, end in itertools.pairwise(case.bounds):
        q_HLd, k_HLd, v_HLd = (x[start:end].transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        scores_HLL = q_HLd @ k_HLd.transpose(1, 2) * scale
        if case.softcap is not None:
            scores_HLL = case.softcap * torch.tanh(scores_HLL / case.softcap)
        ahead_LL = torch.arange(end - start, device=q.device) - torch.arange(end - start, device=q.device).unsqueeze(1)
        hidden_LL = (ahead_LL > 0) if case.causal else torch.zeros_like(ahead_LL, dtype=torch.bool)
        if case.window is not None:
            hidden_LL = hidden_LL | (ahead_LL.abs() >= case.window)
        outs.append((scores_HLL.masked_fill(hidden_LL, float("-inf")).softmax(-1) @ v_HLd).transpose(0, 1))
    out = torch.cat(outs)
    out.backward(dout.to(dtype))
    return out.detach(), q.grad, k.grad, v.grad


def run(case, q, k, v, dout, backend=None, *, deterministic=False):
    """Forward and backward by the raw functions: out, dq, dk, dv."""
    options = case.options(q.device) | {"backend": backend, "deterministic": deterministic}
    out, lse = op.attention_forward(q, k, v, **options)
    assert out.is_contiguous()
    assert out.dtype == q.dtype
    grads = op.attention_backward(dout, q, k, v, out, lse, **options)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    assert all(grad.stride(-1) == 1 and grad.dtype == q.dtype for grad in grads)
    return out, *grads


def assert_budget(case, got, tensors, *, factor):
    oracle, plain = eager(case, *tensors, torch.float64), eager(case, *tensors, case.dtype)
    for name, value, want, rounded in zip(("out", "dq", "dk", "dv"), got, oracle, plain, strict=True):
        if want.any():
            assert_within_budget(value, want, rounded, factor=factor, name=name)
        else:
            # Queries that see one key: the gradient is the difference of two equal sums over d, in fp32 at the least.
            q, k, v, dout = (x.double().abs().max().item() for x in tensors)
            largest = 1e-6 * case.head_dim * dout * v * max(q, k) * (case.scale or case.head_dim**-0.5) * (case.heads // case.kv_heads)
            assert value.double().abs().max().item() <= largest, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_reference_errs_no_more_than_eager_torch(dtype, causal, window, softcap):
    case = Case(UNEVEN, causal=causal, window=window, softcap=softcap, dtype=dtype)
    tensors = case.draw()
    assert_budget(case, run(case, *tensors), tensors, factor=1.5 if dtype == torch.float32 else 1.1)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 1), (3, 3, 5), (6, 1, 8), (8, 2, 3)])
@pytest.mark.parametrize("equal", [False, True])
def test_the_reference_takes_any_heads(heads, kv_heads, head_dim, equal):
    case = Case((7, 7, 7), heads=heads, kv_heads=kv_heads, head_dim=head_dim, equal=equal, scale=0.7)
    tensors = case.draw()
    assert_budget(case, run(case, *tensors), tensors, factor=1.5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_queries_change_nothing_but_memory(monkeypatch, window, causal):
    case = Case((40, 0, 23), window=window, causal=causal, dtype=torch.float64)
    tensors = case.draw()
    whole = run(case, *tensors)
    monkeypatch.setattr(reference, "SCORES_PER_BLOCK", 8 * 3 * (window or 40))
    for got, want in zip(run(case, *tensors), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_reference_holds_no_scores_of_the_whole_sequence(monkeypatch):
    case = Case((256,), heads=2, kv_heads=1)
    monkeypatch.setattr(reference, "SCORES_PER_BLOCK", 2 * 2 * 256 * 8)
    sizes = []
    real = reference._scores

    def scores(*args):
        result = real(*args)
        sizes.append(result[0].numel())
        return result

    monkeypatch.setattr(reference, "_scores", scores)
    run(case, *case.draw())
    assert len(sizes) == 2 * 256 // 8
    assert max(sizes) <= 2 * 256 * 8


def test_gradients_of_the_public_function_are_those_of_fp64():
    case = Case((3, 0, 4), heads=2, kv_heads=1, head_dim=3, window=3, softcap=2.0, dtype=torch.float64)
    q, k, v, _ = (x.detach().clone().requires_grad_() for x in case.draw())
    assert torch.autograd.gradcheck(lambda *args: op.attention(*args, **case.options("cpu")), (q, k, v))


@pytest.mark.parametrize("causal", [True, False])
def test_dense_attention_is_that_of_torch(causal):
    case = Case((6, 6), equal=True, causal=causal, dtype=torch.float64)
    q, k, v, _ = case.draw()
    dense = [x.unflatten(0, (2, 6)).transpose(1, 2) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=causal, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(op.attention(q, k, v, **case.options("cpu")), want)
    without = case.options("cpu") | {"cu_seqlens": None}
    torch.testing.assert_close(op.attention(q, k, v, **without), want)


def test_sequences_of_a_pack_do_not_see_each_other():
    case = Case((6, 9, 4), dtype=torch.float64)
    q, k, v, dout = case.draw()
    before = run(case, q, k, v, dout)
    k, v = k.clone(), v.clone()
    k[6:15] += 1
    v[6:15] *= 2
    after = run(case, q, k, v, dout)
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first[:6], second[:6])
        assert torch.equal(first[15:], second[15:])
        assert not torch.equal(first[6:15], second[6:15])


def test_rows_of_no_sequence_are_zero_in_the_reference():
    case = Case((4, 3))
    tensors = [torch.cat([x, torch.full_like(x[:2], 3.0)]) for x in case.draw()]
    for got, want in zip(run(case, *tensors), run(case, *case.draw()), strict=True):
        assert torch.equal(got[:7], want)
        assert not got[7:].any()


@pytest.mark.parametrize("equal", [False, True])
def test_no_rows_give_no_rows(equal):
    assert_no_rows_give_no_rows("cpu", torch.float32, equal=equal)


def assert_no_rows_give_no_rows(device, dtype, *, equal):
    q, k, v = (torch.zeros(0, heads, 16, dtype=dtype, device=device, requires_grad=True) for heads in (4, 2, 2))
    bounds = None if equal else torch.zeros(3, dtype=torch.int32, device=device)
    out = op.attention(q, k, v, cu_seqlens=bounds, max_seqlen=5, lengths_equal=5 if equal else None)
    out.sum().backward()
    for x, want in ((out, q), (q.grad, q), (k.grad, k), (v.grad, v)):
        assert x is not None
        assert x.shape == want.shape


def test_a_second_derivative_is_refused():
    case = Case((5,), heads=3, kv_heads=3, head_dim=4)
    q, k, v, _ = (x.detach().clone().requires_grad_() for x in case.draw())
    (dq,) = torch.autograd.grad(op.attention(q, k, v, **case.options("cpu")).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_a_gradient_may_come_in_any_layout():
    case = Case((5,), heads=3, kv_heads=3, head_dim=4)
    q, k, v, _ = (x.detach().clone().requires_grad_() for x in case.draw())
    out = op.attention(q, k, v, **case.options("cpu"))
    out.sum().backward()
    assert q.grad is not None
    want = eager(case, q, k, v, torch.ones_like(q), torch.float64)[1]
    torch.testing.assert_close(q.grad.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("bounds", "longest", "message"),
    [
        ([0, 5, 3, 6], 6, "does not ascend from 0 to at most 6"),
        ([1, 6], 6, "does not ascend from 0"),
        ([0, 7], 7, "does not ascend from 0 to at most 6"),
        ([0, 4, 6], 3, "has a sequence of 4 rows and max_seqlen is 3"),
    ],
)
def test_the_reference_reads_the_bounds_and_refuses_wrong_ones(bounds, longest, message):
    with pytest.raises(UnsupportedError, match=message):
        op.attention_forward(*QKV.values(), cu_seqlens=torch.tensor(bounds, dtype=torch.int32), max_seqlen=longest)


def test_a_window_as_long_as_the_sequence_is_none():
    case = Case(UNEVEN, window=20)
    tensors = case.draw()
    for got, want in zip(run(case, *tensors), run(dataclasses.replace(case, window=None), *tensors), strict=True):
        assert torch.equal(got, want)


HOPPER = {"capability": (9, 0), "dtype": torch.bfloat16, "head_dim": 128}


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({}, "cudnn"),
        ({"head_dim": 64, "dtype": torch.float16}, "cudnn"),
        ({"varlen": True}, "flash"),
        ({"varlen": True, "fa3": True}, "fa3"),
        ({"fa3": True}, "cudnn"),
        ({"window": 128}, "flash"),
        ({"head_dim": 256}, "cudnn"),
        ({"head_dim": 256, "capability": (8, 9)}, "flash"),
        ({"head_dim": 256, "varlen": True}, "flash"),
        ({"deterministic": True}, "flash"),
        ({"deterministic": True, "varlen": True, "fa3": True}, "flash"),
        ({"softcap": 50.0}, "flex"),
        ({"softcap": 50.0, "head_dim": 8}, "reference"),
        ({"softcap": 50.0, "fa3": True}, "fa3"),
        ({"softcap": 50.0, "fa3": True, "deterministic": True}, "flex"),
        ({"capability": (8, 0), "varlen": True, "fa3": True}, "flash"),
        ({"capability": (8, 0)}, "cudnn"),
        ({"capability": (7, 5)}, "reference"),
        ({"capability": None}, "reference"),
        ({"dtype": torch.float32}, "reference"),
        ({"head_dim": 512}, "reference"),
        ({"head_dim": 100, "softcap": 50.0}, "reference"),
    ],
)
def test_the_case_alone_decides_the_backend(change, backend):
    assert op.choose_backend(**{**HOPPER, **change}) == backend


@pytest.mark.parametrize("name", list(backends.OPERATOR_ARGUMENTS))
def test_torchs_private_operators_take_what_the_calls_pass(name):
    wanted = backends.OPERATOR_ARGUMENTS[name]
    schema = getattr(torch.ops.aten, name).default._schema
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    keywords = [argument.name for argument in schema.arguments if argument.kwarg_only]
    passed_by_place = [argument for argument in wanted if argument not in keywords]
    assert positional == passed_by_place
    assert set(wanted) <= {*positional, *keywords}
    returned = {"_scaled_dot_product_cudnn_attention": 9, "_flash_attention_forward": 5}
    assert len(schema.returns) == returned.get(name, 3)


@pytest.mark.parametrize(
    ("backend", "equal", "window"), [("flash", False, None), ("flash", False, 4), ("flash", True, 4), ("cudnn", True, None)]
)
def test_fused_calls_fit_the_operators_shapes(backend, equal, window):
    """Torch's own shape functions take the calls; nothing is computed."""
    case = Case((16, 16), heads=4, kv_heads=2, head_dim=64, equal=equal, window=window, dtype=torch.bfloat16)
    q, k, v, dout = case.draw("meta")
    problem = Problem(
        cu_seqlens_S=case.options("meta")["cu_seqlens"],
        max_seqlen=16,
        length=16 if equal else None,
        scale=0.125,
        causal=True,
        window=window,
        softcap=None,
    )
    out, lse = backends.forward(backend, q, k, v, problem)
    assert out.shape == q.shape
    assert out.is_contiguous()
    grads = backends.backward(backend, dout, q, k, v, out, lse, problem)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 4), (False, 4)])
def test_flex_masks_and_caps_as_the_reference_does(monkeypatch, causal, window):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(backends, "_compiled_flex", lambda: flex_attention)
    for equal, lengths in ((False, UNEVEN), (True, (9, 9))):
        case = Case(lengths, causal=causal, window=window, softcap=1.5, equal=equal, dtype=torch.float32)
        q, k, v, _ = case.draw()
        problem = Problem(**_problem_fields(case))
        with warnings.catch_warnings():
            # That it is slow without compilation.
            warnings.simplefilter("ignore")
            out, lse = backends.forward("flex", q, k, v, problem)
        want_out, want_lse = reference.forward(q, k, v, problem)
        torch.testing.assert_close(out, want_out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[0], want_lse, rtol=1e-5, atol=1e-5)


def _problem_fields(case) -> dict[str, Any]:
    return {
        "cu_seqlens_S": case.options("cpu")["cu_seqlens"],
        "max_seqlen": max(case.lengths),
        "length": case.lengths[0] if case.equal else None,
        "scale": case.head_dim**-0.5,
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
    }


@pytest.mark.parametrize("start", [(False, False), (True, True), (True, False)])
def test_the_deterministic_backward_leaves_torchs_switch_as_it_was(start):
    enabled, warn_only = start
    try:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        with backends._determinism():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()) == start
    finally:
        torch.use_deterministic_algorithms(False)


QKV = {"q_THd": torch.zeros(6, 4, 8), "k_TKd": torch.zeros(6, 2, 8), "v_TKd": torch.zeros(6, 2, 8)}
BOUNDS = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_THd": torch.zeros(6, 32)}, r"q has shape \(6, 32\)"),
        ({"q_THd": torch.zeros(6, 8, 4).transpose(1, 2)}, r"q has shape .* strides \(32, 1, 4\)"),
        ({"q_THd": torch.zeros(6, 4, 8, dtype=torch.int32)}, "q is torch.int32"),
        ({"k_TKd": torch.zeros(6, 2, 8, dtype=torch.bfloat16)}, "k is torch.bfloat16 on cpu; q's dtype"),
        ({"v_TKd": torch.zeros(6, 2, 8, device="meta")}, "v is torch.float32 on meta"),
        ({"v_TKd": torch.zeros(6, 1, 8)}, r"k is \(6, 2, 8\) and v \(6, 1, 8\)"),
        ({"k_TKd": torch.zeros(6, 3, 8), "v_TKd": torch.zeros(6, 3, 8)}, "q has 4 heads and k 3"),
        ({"cu_seqlens": None}, "cu_seqlens is None"),
        ({"cu_seqlens": BOUNDS.long()}, "cu_seqlens is torch.int64"),
        ({"cu_seqlens": BOUNDS[:1]}, r"cu_seqlens is torch.int32 of shape \(1,\)"),
        ({"cu_seqlens": BOUNDS.to("meta")}, "cu_seqlens is on meta"),
        ({"max_seqlen": 0}, "max_seqlen is 0"),
        ({"lengths_equal": 4}, "lengths_equal is 4 for 6 rows"),
        ({"lengths_equal": 6, "max_seqlen": 5}, "lengths_equal is 6 for 6 rows and max_seqlen 5"),
        ({"window": 0}, "window is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"softcap": float("inf")}, "softcap is inf; a positive finite number"),
        ({"softcap": float("nan")}, "softcap is nan"),
        ({"scale": float("nan")}, "scale is nan; a finite number or None"),
        ({"backend": "flash"}, "backend is flash and q is on cpu"),
    ],
)
def test_unsupported_inputs_are_named(change, message):
    arguments: dict[str, Any] = {**QKV, "cu_seqlens": BOUNDS, "max_seqlen": 6, **change}
    positional = [arguments.pop(name) for name in QKV]
    with pytest.raises(UnsupportedError, match=message):
        op.attention_forward(*positional, **arguments)


def test_unsupported_gradients_are_named():
    q, k, v = QKV.values()
    out, lse = op.attention_forward(q, k, v, cu_seqlens=BOUNDS, max_seqlen=6)
    with pytest.raises(UnsupportedError, match=r"dout is torch.float32 \(6, 2, 8\)"):
        op.attention_backward(k, q, k, v, out, lse, cu_seqlens=BOUNDS, max_seqlen=6)
    with pytest.raises(UnsupportedError, match=r"out is torch.float64"):
        op.attention_backward(q, q, k, v, out.double(), lse, cu_seqlens=BOUNDS, max_seqlen=6)
    with pytest.raises(UnsupportedError, match=r"lse is torch.bfloat16 on cpu; torch.float32 on cpu is wanted"):
        op.attention_backward(q, q, k, v, out, lse.bfloat16(), cu_seqlens=BOUNDS, max_seqlen=6)


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("cudnn", {"window": 4}, "cudnn does not take a window"),
        ("cudnn", {"softcap": 4.0}, "cudnn does not take a softcap"),
        ("cudnn", {"length": None}, "cudnn does not take sequences of different lengths"),
        ("cudnn", {"length": 1}, "cudnn does not take sequences of a single row"),
        ("cudnn", {"deterministic": True}, "cudnn does not take determinism"),
        ("flex", {"head_dim": 8}, "flex does not take a head dim under 16"),
        ("flash", {"softcap": 4.0}, "flash does not take a softcap"),
        ("eager", {}, "backend is 'eager'; one of cudnn"),
        ("flash", {"dtype": torch.float32}, "flash does not take torch.float32 with head dim 16"),
        ("flash", {"head_dim": 12}, "flash does not take torch.bfloat16 with head dim 12"),
    ],
)
def test_a_backend_asked_for_by_name_says_what_it_does_not_take(backend, change, message):
    case = Case((4, 4), equal=True)
    fields = _problem_fields(case) | {name: value for name, value in change.items() if name in Problem.__slots__}
    q = torch.zeros(8, 4, change.get("head_dim", 16), dtype=change.get("dtype", torch.bfloat16))
    with pytest.raises(UnsupportedError, match=message):
        backends.check(backend, q, Problem(**fields))


BF16 = torch.bfloat16
LONG = (1, 700, 64, 0, 129, 300, 0, 0)
GPU_CASES = {
    "pack of 32/8 heads by 128": Case(LONG, 32, 8, 128, dtype=BF16),
    "pack of 9/3 heads by 64": Case(LONG, 9, 3, 64, dtype=BF16),
    "pack of 8/4 heads by 256": Case((300, 33), 8, 4, 256, dtype=BF16),
    "pack by 96, fp16": Case(LONG, 4, 4, 96, dtype=torch.float16),
    "pack by 8": Case(LONG, 2, 1, 8, dtype=BF16),
    "pack under a window": Case(LONG, 8, 2, 128, window=100, dtype=BF16),
    "pack under a window of one": Case(LONG, 8, 2, 64, window=1, dtype=BF16),
    "pack, not causal": Case(LONG, 8, 2, 64, causal=False, dtype=BF16),
    "pack under a window, not causal": Case(LONG, 8, 2, 64, causal=False, window=50, dtype=BF16),
    "pack of single rows": Case((1, 1, 1), 8, 2, 128, dtype=BF16),
    "dense 32/8 heads by 128": Case((513,) * 3, 32, 8, 128, equal=True, dtype=BF16),
    "dense, one sequence": Case((1024,), 8, 2, 128, equal=True, scale=0.05, dtype=BF16),
    "dense by 64, fp16": Case((100,) * 5, 9, 3, 64, equal=True, dtype=torch.float16),
    "dense by 64, two rows": Case((2,) * 7, 4, 2, 64, equal=True, dtype=BF16),
    "dense, not causal": Case((200,) * 2, 8, 2, 128, causal=False, equal=True, dtype=BF16),
    "dense by 256": Case((256,) * 2, 8, 4, 256, equal=True, dtype=BF16),
    "dense of single rows": Case((1,) * 5, 8, 2, 128, equal=True, dtype=BF16),
    "dense under a window": Case((300,) * 2, 8, 2, 64, window=64, equal=True, dtype=BF16),
    "capped pack of 8/4 heads by 256": Case(LONG, 8, 4, 256, softcap=50.0, scale=0.0625, dtype=BF16),
    "capped pack under a window": Case(LONG, 4, 2, 128, softcap=5.0, window=100, dtype=BF16),
    "capped, dense": Case((256,) * 2, 4, 4, 64, softcap=2.0, equal=True, dtype=BF16),
}


def takes(backend, case):
    """Whether a backend is there for a case; which one a case gets is another question."""
    if backend == "reference":
        return True
    problem = Problem(**_problem_fields(case))
    try:
        backends.check(backend, torch.empty(1, case.heads, case.head_dim, dtype=case.dtype, device="cuda"), problem)
    except UnsupportedError:
        return False
    return backend != "fa3" or torch.cuda.get_device_capability()[0] == 9


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "cudnn", "flash", "fa3", "flex", "reference"])
@pytest.mark.parametrize("name", list(GPU_CASES))
def test_every_backend_keeps_the_budget_on_a_gpu(backend, name):
    case = GPU_CASES[name]
    if backend is not None and not takes(backend, case):
        pytest.skip(f"{backend} does not take the case")
    tensors = case.draw("cuda")
    # Eager torch rounds scores and probabilities; what a fused backend rounds besides is the output and the gradients' sums.
    assert_budget(case, run(case, *tensors, backend), tensors, factor=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["pack of 32/8 heads by 128", "dense 32/8 heads by 128", "pack under a window", "capped pack under a window"]
)
def test_the_deterministic_mode_repeats_itself_bit_by_bit(name):
    case = GPU_CASES[name]
    tensors = case.draw("cuda")
    runs = [run(case, *tensors, deterministic=True) for _ in range(4)]
    for other in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], other, strict=True))
    assert_budget(case, runs[0], tensors, factor=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pack of 32/8 heads by 128", "dense 32/8 heads by 128"])
def test_the_public_function_is_differentiable_on_a_gpu(name):
    case = GPU_CASES[name]
    *qkv, dout = case.draw("cuda")
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = op.attention(*leaves, **case.options("cuda"))
    out.backward(dout)
    assert_budget(case, (out.detach(), *(leaf.grad for leaf in leaves)), (*qkv, dout), factor=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_take_the_reference_on_a_gpu(dtype):
    case = Case(LONG, 4, 2, 64, dtype=dtype)
    tensors = case.draw("cuda")
    assert_budget(case, run(case, *tensors), tensors, factor=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("equal", [False, True])
def test_no_rows_give_no_rows_on_a_gpu(dtype, equal):
    assert_no_rows_give_no_rows("cuda", dtype, equal=equal)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "fa3"])
def test_a_captured_graph_takes_new_sequences(backend):
    """The number of sequences and the longest length are the capture's; the bounds are data."""
    if backend == "fa3" and not backends.fa3_installed():
        pytest.skip("flash_attn_interface is not installed")
    packs = [
        Case((300, 212, 0, 0), 8, 2, 128, dtype=BF16),
        Case((1, 255, 200, 56), 8, 2, 128, dtype=BF16),
        Case((512, 0, 0, 0), 8, 2, 128, dtype=BF16),
    ]
    q, k, v, dout = (x.clone() for x in packs[0].draw("cuda"))
    bounds = packs[0].options("cuda")["cu_seqlens"]
    options: dict[str, Any] = {"cu_seqlens": bounds, "max_seqlen": 512, "backend": backend}

    def step():
        out, lse = op.attention_forward(q, k, v, **options)
        return out, *op.attention_backward(dout, q, k, v, out, lse, **options)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for seed, case in enumerate(packs):
        tensors = case.draw("cuda", seed=10 * seed)
        for buffer, value in zip((q, k, v, dout), tensors, strict=True):
            buffer.copy_(value)
        bounds.copy_(case.options("cuda")["cu_seqlens"])
        graph.replay()
        assert_budget(case, got, tensors, factor=1.5)


@pytest.mark.gpu
def test_a_captured_graph_replays_dense_attention():
    case = Case((256,) * 2, 8, 2, 128, equal=True, dtype=BF16)
    q, k, v, dout = (x.clone() for x in case.draw("cuda"))
    options = case.options("cuda")

    def step():
        out, lse = op.attention_forward(q, k, v, **options)
        return out, *op.attention_backward(dout, q, k, v, out, lse, **options)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    tensors = case.draw("cuda", seed=7)
    for buffer, value in zip((q, k, v, dout), tensors, strict=True):
        buffer.copy_(value)
    graph.replay()
    assert_budget(case, got, tensors, factor=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("equal", [True, False])
def test_rows_beyond_two_to_the_31_elements_are_reached(equal):
    length, num_sequences, row_stride = 1024, 400, 6144
    last = Case((length,), 4, 2, 64, dtype=BF16)
    row = torch.zeros(length * num_sequences, row_stride, dtype=BF16, device="cuda")
    assert row.numel() > 2**31
    *parts, dout = last.draw("cuda")
    row[-length:, : 8 * 64] = torch.cat([part.flatten(1) for part in parts], dim=1)
    q, k, v = row[:, : 8 * 64].unflatten(1, (8, 64)).split([4, 2, 2], dim=1)
    wide_dout = torch.zeros(len(q), 4, 64, dtype=BF16, device="cuda")
    wide_dout[-length:] = dout
    whole = Case((length,) * num_sequences, 4, 2, 64, equal=equal, dtype=BF16)
    got = run(whole, q, k, v, wide_dout)
    assert_budget(last, [x[-length:] for x in got], (*parts, dout), factor=1.5)
    assert not got[0][: length * 3].any()
