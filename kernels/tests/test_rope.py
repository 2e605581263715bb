"""Rotary embedding and per-head RMSNorm against fp64: reference and kernels, both ways, partial and no rotation, strided rows, in place."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from finery_kernels import rope as op
from finery_kernels.errors import UnsupportedError
from finery_kernels.testing import (
    ARCHITECTURES,
    assert_padding_untouched,
    assert_within_budget,
    compilation,
    compile_all,
    kernel_device,
    poisoned,
    random_normal,
    strided,
    truncation_factor,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLEMENTATIONS = ["reference", "triton"]
EPS = 1e-5
NUM_POSITIONS = 11
# Tokens, query heads, key heads, head dimension, rotary dimension (0: no rotation).
SHAPES = [(5, 4, 2, 16, 16), (3, 3, 1, 10, 6), (2, 1, 1, 32, 24), (1, 9, 3, 8, 8), (4, 2, 2, 12, 0)]


@dataclass
class Case:
    """Inputs in the dtype under test; every use makes its own copies."""

    qkv: torch.Tensor
    gradient: torch.Tensor
    heads: tuple[int, int]
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    weights: tuple[torch.Tensor, torch.Tensor] | None
    offset: float


def budget(dtype, *, norm):
    """Factor on the eager error. fp32 has no wider dtype inside, and a GPU's reciprocal root is good to 2 ulp, not to half."""
    wide = 3.0 if norm else 1.5
    return (wide if dtype == torch.float32 else 1.0) * truncation_factor(dtype)


def implementation(name):
    """The raw functions of one implementation and the device they run on; the kernel is interpreted where there is no GPU."""
    module = importlib.import_module(f"finery_kernels.rope.{name}")
    return module, kernel_device() if name == "triton" else torch.device("cpu")


def make_table(num_tokens, rotary_dim, *, num_positions=NUM_POSITIONS, dtype=torch.float32, device="cpu", index=torch.int64, scaling=1.0):
    angles = torch.outer(torch.arange(num_positions), 100.0 ** -(torch.arange(rotary_dim // 2) / (rotary_dim // 2))).repeat(1, 2)
    positions = torch.randint(0, num_positions, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
    cos, sin = (scaling * angles.double().cos()).to(dtype), (scaling * angles.double().sin()).to(dtype)
    return cos.to(device), sin.to(device), positions.to(device, index)


def make_case(shape, dtype, *, seed=0, norm=False, offset=0.0, device="cpu", **table):
    num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim = shape
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv, gradient = (random_normal(num_tokens, width, seed=10 * seed + index, dtype=dtype, device=device, scale=3.0) for index in (1, 2))
    weights = None
    if norm:
        weights = tuple(random_normal(head_dim, seed=index, dtype=dtype, device=device, scale=0.3, mean=1 - offset) for index in (3, 4))
    wide = torch.promote_types(dtype, torch.float32)
    rotation = make_table(num_tokens, rotary_dim, dtype=wide, device=device, **table) if rotary_dim else None
    return Case(qkv, gradient, (num_heads, num_kv_heads), rotation, weights, offset)


def split(rows, heads):
    """The query, key and value heads of rows, as views."""
    head_dim = rows.shape[1] // (heads[0] + 2 * heads[1])
    return tuple(part.unflatten(1, (-1, head_dim)) for part in rows.split([n * head_dim for n in (heads[0], heads[1], heads[1])], dim=1))


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def eager_heads(x, weight, case):
    """transformers' way in the dtype of `x`: the norm inside in fp32, its weight, the tables and the rotation in that dtype."""
    if weight is not None:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * (weight + case.offset)
    if case.table is None:
        return x
    cos, sin = (table[case.table[2].long()][:, None].to(x.dtype) for table in case.table[:2])
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)


def eager(case, dtype):
    """The row after the forward pass, its gradient before, and the weights' gradients. In fp64 this is the oracle."""
    qkv = case.qkv.detach().to(dtype).requires_grad_()
    weights = [None, None] if case.weights is None else [weight.detach().to(dtype).requires_grad_() for weight in case.weights]
    parts = [*(eager_heads(x, weight, case) for x, weight in zip(split(qkv, case.heads), weights, strict=False)), split(qkv, case.heads)[2]]
    row = torch.cat([part.flatten(1) for part in parts], dim=1)
    row.backward(case.gradient.to(dtype))
    assert qkv.grad is not None
    return (row.detach(), qkv.grad, *(weight.grad for weight in weights if weight is not None))


def run(module, case, *, gap=5, **options):
    """What `eager` returns, by an implementation: forwards in place, backwards into a poisoned buffer, rows apart on the way."""
    width = case.qkv.shape[1]
    row = strided(case.qkv, row_stride=width + gap)
    target = poisoned(*case.qkv.shape, dtype=case.qkv.dtype, device=case.qkv.device, row_stride=width + 2 * gap + 1)
    heads, gradients, targets = (
        split(row, case.heads),
        split(strided(case.gradient, row_stride=width + 3), case.heads),
        split(target, case.heads),
    )
    dweights = ()
    if case.weights is None:
        module.rotate(heads[:2], heads[:2], case.table, inverse=False)
        module.rotate(gradients, targets, case.table, inverse=True)
    else:
        rstd = poisoned(row.shape[0], sum(case.heads), dtype=torch.float32, device=row.device)
        kept = poisoned(*row.shape, dtype=row.dtype, device=row.device, row_stride=width + 7)
        pre = split(kept, case.heads)[:2]
        norm = {"norm_offset": case.offset, "rstd_TG": rstd}
        module.norm_rotate(heads[:2], heads[:2], case.weights, case.table, eps=EPS, pre=pre, **norm)
        assert_padding_untouched(kept)
        dweights = tuple(torch.zeros_like(weight, dtype=torch.float32) for weight in case.weights)
        module.norm_rotate_backward(gradients, pre, targets, case.weights, case.table, dweights=dweights, **norm, **options)
    for buffer in (row, target):
        assert_padding_untouched(buffer)
    return row, target, *dweights


def assert_cases_within_budget(module, cases, dtype, *, norm):
    """One budget a result over all cases: few values make a chance of what eager torch gets wrong."""
    names = ("row", "gradient", "dq_norm", "dk_norm")[: 4 if norm else 2]
    results = [(run(module, case), eager(case, torch.float64), eager(case, dtype)) for case in cases]
    for index, name in enumerate(names):
        got, oracle, plain = (torch.cat([result[kind][index].flatten() for result in results]) for kind in range(3))
        assert_within_budget(got, oracle, plain, factor=budget(dtype, norm=norm), name=name)


@pytest.mark.parametrize(("name", "dtype"), [*itertools.product(IMPLEMENTATIONS, DTYPES)])
def test_the_rotation_and_its_gradient_err_no_more_than_eager_torch(name, dtype):
    module, device = implementation(name)
    cases = [make_case(shape, dtype, seed=seed, device=device, scaling=1.2) for seed, shape in enumerate(SHAPES[:4])]
    assert_cases_within_budget(module, cases, dtype, norm=False)


@pytest.mark.parametrize(("name", "dtype", "offset"), [*itertools.product(IMPLEMENTATIONS, DTYPES, [0.0, 1.0])])
def test_the_norm_before_the_rotation_errs_no_more_than_eager_torch(name, dtype, offset):
    module, device = implementation(name)
    cases = [make_case(shape, dtype, seed=seed, norm=True, offset=offset, device=device) for seed, shape in enumerate(SHAPES)]
    assert_cases_within_budget(module, cases, dtype, norm=True)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_without_a_rotation_the_gradients_are_copied(name):
    module, device = implementation(name)
    case = make_case(SHAPES[4], torch.bfloat16, device=device)
    target = poisoned(*case.qkv.shape, dtype=case.qkv.dtype, device=device)
    module.rotate(split(case.gradient, case.heads), split(target, case.heads), None, inverse=True)
    assert torch.equal(target, case.gradient)


@pytest.mark.parametrize(("name", "norm", "index"), [*itertools.product(IMPLEMENTATIONS, [False, True], [torch.int32, torch.int64])])
def test_a_position_outside_the_tables_makes_its_row_nan(name, norm, index):
    module, device = implementation(name)
    case = make_case((4, 2, 1, 8, 6), torch.float32, norm=norm, device=device, index=index)
    assert case.table is not None
    want = run(module, case)
    case.table[2][1], case.table[2][3] = NUM_POSITIONS, -1
    got = run(module, case)
    for rows, expected in zip(got[:2], want[:2], strict=True):
        heads = torch.cat([part[..., :6].flatten(1) for part in split(rows, case.heads)[:2]], dim=1)
        assert torch.isnan(heads[[1, 3]]).all()
        assert torch.equal(rows[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(("name", "norm"), [*itertools.product(IMPLEMENTATIONS, [False, True])])
def test_gradients_may_be_rotated_where_they_lie(name, norm):
    module, device = implementation(name)
    case = make_case((5, 3, 1, 20, 12), torch.float32, norm=norm, device=device)
    want = run(module, case)[1]
    parts = split(case.gradient, case.heads)
    if norm:
        rstd = torch.rsqrt(case.qkv.unflatten(1, (-1, 20)).square().mean(-1) + EPS)[:, :4].contiguous()
        pre = split(case.qkv, case.heads)[:2]
        module.norm_rotate_backward(parts, pre, parts, case.weights, case.table, norm_offset=0.0, rstd_TG=rstd)
        torch.testing.assert_close(case.gradient, want, rtol=1e-5, atol=1e-5)
    else:
        module.rotate(parts[:2], parts[:2], case.table, inverse=True)
        assert torch.equal(case.gradient, want)


def test_the_weights_gradients_are_added_in_the_same_order_every_time():
    module, device = implementation("triton")
    case = make_case((11, 2, 1, 16, 16), torch.float32, norm=True, device=device)
    first, second = (run(module, case, num_programs=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for got, oracle, plain in zip(first[2:], eager(case, torch.float64)[2:], eager(case, torch.float32)[2:], strict=True):
        assert_within_budget(got, oracle, plain, factor=budget(torch.float32, norm=True))


@pytest.mark.parametrize(("name", "norm"), [*itertools.product(IMPLEMENTATIONS, [False, True])])
def test_no_tokens_are_fine(name, norm):
    module, device = implementation(name)
    row, gradient, *dweights = run(module, make_case((0, 2, 1, 8, 8), torch.float32, norm=norm, device=device))
    assert row.shape == gradient.shape == (0, 32)
    assert not any(dweight.any() for dweight in dweights)


def forward_options(case):
    head_dim = case.qkv.shape[1] // (case.heads[0] + 2 * case.heads[1])
    options = {"num_heads": case.heads[0], "num_kv_heads": case.heads[1], "head_dim": head_dim}
    if case.weights is not None:
        options |= {"q_norm": case.weights[0], "k_norm": case.weights[1], "eps": EPS, "norm_offset": case.offset}
    return options


def run_public(case):
    """What `eager` returns, by the raw public functions."""
    table = (None, None, None) if case.table is None else case.table
    row, options = case.qkv.clone(), forward_options(case)
    if case.weights is None:
        assert op.rope_qkv_forward_(row, *table, **options) is None
        return row, op.rope_qkv_backward(*split(case.gradient, case.heads), *table)
    pre = poisoned(row.shape[0], sum(case.heads) * options["head_dim"], dtype=row.dtype, device=row.device, row_stride=row.shape[1])
    rstd = op.rope_qkv_forward_(row, *table, pre_out=pre, **options)
    assert rstd is not None
    assert torch.equal(pre, case.qkv[:, : pre.shape[1]])
    dweights = tuple(torch.zeros_like(weight, dtype=rstd.dtype) for weight in case.weights)
    norm = {name: options[name] for name in ("q_norm", "k_norm", "norm_offset")}
    norm |= {"pre_TN": pre, "rstd_TG": rstd, "dq_norm": dweights[0], "dk_norm": dweights[1]}
    out = poisoned(*row.shape, dtype=row.dtype, device=row.device, row_stride=row.shape[1] + 8)
    assert op.rope_qkv_backward(*split(case.gradient, case.heads), *table, out_TN=out, **norm) is out
    return row, out, *dweights


@pytest.mark.parametrize(("shape", "norm"), [*itertools.product(SHAPES, [False, True])])
def test_raw_functions_are_exact_in_fp64(shape, norm):
    case = make_case(shape, torch.float64, norm=norm, offset=1.0)
    for got, want in zip(run_public(case), eager(case, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_values_that_lie_in_the_row_already_are_not_copied():
    case = make_case(SHAPES[0], torch.float32)
    assert case.table is not None
    want = op.rope_qkv_backward(*split(case.gradient, case.heads), *case.table)
    parts = split(case.gradient, case.heads)
    row = op.rope_qkv_backward(*parts, *case.table, out_TN=case.gradient.clone())
    assert torch.equal(op.rope_qkv_backward(parts[0], parts[1], None, *case.table, out_TN=case.gradient.clone()), row)
    assert torch.equal(op.rope_qkv_backward(*parts, *case.table, out_TN=case.gradient), want)


def test_the_whole_row_serves_as_what_was_before_the_norm():
    case = make_case(SHAPES[0], torch.float32, norm=True)
    assert case.table is not None
    assert case.weights is not None
    rstd = torch.empty(5, 6)
    assert op.rope_qkv_forward_(case.qkv.clone(), *case.table, rstd_out=rstd, **forward_options(case)) is rstd
    norm = {"q_norm": case.weights[0], "k_norm": case.weights[1], "rstd_TG": rstd}
    out = op.rope_qkv_backward(*split(case.gradient, case.heads), *case.table, pre_TN=case.qkv, **norm)
    assert torch.equal(out, run_public(case)[1])


@pytest.mark.parametrize("rotary_dim", [8, 6])
def test_gradients_of_the_public_functions_are_those_of_fp64_torch(rotary_dim):
    cos, sin, positions = make_table(6, rotary_dim, dtype=torch.float64)
    q, k = (random_normal(2, 3, heads, 8, seed=heads, dtype=torch.float64).requires_grad_() for heads in (2, 1))
    weights = [random_normal(8, seed=seed, dtype=torch.float64).requires_grad_() for seed in (3, 4)]
    positions = positions.view(2, 3)
    assert torch.autograd.gradcheck(lambda *args: op.rope(*args, cos, sin, positions), (q, k))
    assert torch.autograd.gradcheck(lambda *args: op.qk_norm_rope(*args, cos, sin, positions, eps=EPS, norm_offset=1.0), (q, k, *weights))
    assert torch.autograd.gradcheck(lambda *args: op.qk_norm_rope(*args, None, None, None, eps=EPS), (q, k, *weights))


def test_public_functions_take_head_first_layouts_and_positions_that_expand():
    cos, sin, _ = make_table(5, 8)
    q, k = (random_normal(2, heads, 5, 8, seed=heads).requires_grad_() for heads in (4, 2))
    turned_q, turned_k = op.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, torch.arange(5))
    for got, x in ((turned_q, q), (turned_k, k)):
        torch.testing.assert_close(got.transpose(1, 2), x * cos[:5] + rotate_half(x) * sin[:5])
    (turned_q.sum() + turned_k.sum()).backward()
    assert q.grad is not None
    assert k.grad is not None
    torch.testing.assert_close(q.grad, cos[:5] + torch.cat((sin[:5, :4], -sin[:5, :4]), dim=-1).expand_as(q))


def test_frozen_weights_cost_no_gradient():
    q, k = (random_normal(3, 2, 8, seed=seed).requires_grad_() for seed in (1, 2))
    weights = torch.ones(8), torch.ones(8)
    op.qk_norm_rope(q, k, *weights, None, None, None, eps=EPS)[0].sum().backward()
    assert weights[0].grad is None
    assert q.grad is not None


FORWARD = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_TN": torch.zeros(2, 33)}, r"qkv_TN has shape \(2, 33\); wanted \(2, 32\)"),
        ({"qkv_TN": torch.zeros(2, 32, dtype=torch.int32)}, "qkv_TN is torch.int32; wanted bfloat16"),
        ({"qkv_TN": torch.zeros(32, 2).t()}, r"qkv_TN has strides \(1, 2\); wanted a unit stride"),
        ({"qkv_TN": torch.zeros(2, 4, 8)}, r"qkv_TN has shape \(2, 4, 8\)"),
        ({"sin_PR": None}, "of cos_PR, sin_PR and positions_T some are None"),
        ({"positions_T": None}, "of cos_PR, sin_PR and positions_T some are None"),
        ({"sin_PR": torch.zeros(4, 6)}, r"sin_PR has shape \(4, 6\); wanted \[P, R\], R even and at most 8, the same for both"),
        ({"cos_PR": torch.zeros(4, 10), "sin_PR": torch.zeros(4, 10)}, r"cos_PR has shape \(4, 10\)"),
        ({"cos_PR": torch.zeros(4, 8, dtype=torch.bfloat16)}, "cos_PR is torch.bfloat16 on cpu .*; wanted torch.float32"),
        ({"cos_PR": torch.zeros(8, 4).t()}, r"cos_PR .* strides \(1, 4\); wanted .* contiguous"),
        ({"positions_T": torch.zeros(2)}, r"positions_T is torch.float32 .*; wanted int32 or int64 of shape \(2,\)"),
        ({"positions_T": torch.zeros(3, dtype=torch.int64)}, r"positions_T is torch.int64 of shape \(3,\)"),
        ({"positions_T": torch.zeros(4, dtype=torch.int64)[::2]}, "positions_T has stride 2; wanted 1"),
        ({"q_norm": torch.ones(8)}, "one of q_norm and k_norm is None; wanted both or neither"),
        ({"q_norm": torch.ones(7), "k_norm": torch.ones(8)}, r"q_norm has shape \(7,\) .*; wanted \(8,\)"),
        ({"q_norm": torch.ones(8, dtype=torch.int8), "k_norm": torch.ones(8)}, "q_norm is torch.int8; wanted a floating dtype"),
        ({"pre_out": torch.zeros(2, 24)}, "pre_out and rstd_out go with q_norm and k_norm"),
        (
            {"q_norm": torch.ones(8), "k_norm": torch.ones(8), "pre_out": torch.zeros(2, 32)},
            r"pre_out has shape \(2, 32\); wanted \(2, 24\)",
        ),
        ({"q_norm": torch.ones(8), "k_norm": torch.ones(8), "rstd_out": torch.zeros(2, 4)}, r"rstd_out is .* wanted .* shape \(2, 3\)"),
        ({"head_dim": 7, "qkv_TN": torch.zeros(2, 28)}, "head_dim is 7; wanted an even number"),
        ({"num_heads": 0, "qkv_TN": torch.zeros(2, 16)}, "num_heads is 0 and num_kv_heads 1; wanted at least 1 of either"),
        ({"qkv_TN": torch.tensor(0.0)}, r"qkv_TN has shape \(\); wanted \[T, \(H \+ 2K\)d\]"),
    ],
)
def test_unsupported_forward_inputs_are_named(change, message):
    zeros, positions = torch.zeros(4, 8), torch.zeros(2, dtype=torch.int64)
    arguments = {"qkv_TN": torch.zeros(2, 32), "cos_PR": zeros, "sin_PR": zeros, "positions_T": positions, **FORWARD, **change}
    positional = [arguments.pop(name) for name in ("qkv_TN", "cos_PR", "sin_PR", "positions_T")]
    with pytest.raises(UnsupportedError, match=message):
        op.rope_qkv_forward_(*positional, **arguments)


def test_what_was_before_the_norm_is_kept_beside_the_rows_and_not_over_them():
    options = {**FORWARD, "q_norm": torch.ones(8), "k_norm": torch.ones(8), "eps": EPS}
    buffer = random_normal(3, 80, seed=1)
    rows, beside = buffer[:, 24:56], buffer[:, 56:]
    before = rows.clone()
    op.rope_qkv_forward_(rows, None, None, None, pre_out=beside, **options)
    assert torch.equal(beside, before[:, :24])
    for first in (1, 24, 32, 55):
        with pytest.raises(UnsupportedError, match="pre_out overlaps qkv_TN; wanted memory of its own"):
            op.rope_qkv_forward_(rows, None, None, None, pre_out=buffer[:, first : first + 24], **options)


NORMS = {"q_norm": torch.ones(8), "k_norm": torch.ones(8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dq_THd": torch.zeros(2, 16)}, r"dq_THd has shape \(2, 16\)"),
        ({"dq_THd": torch.zeros(2, 0, 8)}, r"dq_THd has shape \(2, 0, 8\); wanted \[2 tokens, heads, 8\], at least one head"),
        ({"dk_TKd": torch.zeros(3, 1, 8)}, r"dk_TKd has shape \(3, 1, 8\); wanted \[2 tokens, heads, 8\]"),
        ({"dk_TKd": torch.zeros(2, 1, 8, dtype=torch.float16)}, "dk_TKd is torch.float16 on cpu; wanted torch.float32"),
        ({"dv_TKd": torch.zeros(2, 2, 8)}, "dv_TKd has 2 heads; wanted 1, as dk_TKd has"),
        ({"dv_TKd": torch.zeros(2, 8, 1).transpose(1, 2).expand(2, 1, 8)[..., ::2]}, r"dv_TKd has shape \(2, 1, 4\)"),
        ({"dv_TKd": None}, "dv_TKd and out_TN are both None"),
        ({"out_TN": torch.zeros(2, 24)}, r"out_TN has shape \(2, 24\); wanted \(2, 32\)"),
        ({**NORMS}, r"pre_TN has shape None; wanted \[2, 24 or 32\]"),
        ({**NORMS, "pre_TN": torch.zeros(2, 30)}, r"pre_TN has shape \(2, 30\)"),
        ({**NORMS, "pre_TN": torch.zeros(2, 24)}, "rstd_TG is None; wanted what the forward pass"),
        ({**NORMS, "pre_TN": torch.zeros(2, 24), "rstd_TG": torch.zeros(2, 2)}, r"rstd_TG is .* shape \(2, 2\)"),
        (
            {**NORMS, "pre_TN": torch.zeros(2, 24), "rstd_TG": torch.zeros(2, 3), "dq_norm": torch.ones(8)},
            "one of dq_norm and dk_norm is None",
        ),
        (
            {**NORMS, "pre_TN": torch.zeros(2, 24), "rstd_TG": torch.zeros(2, 3)}
            | {"dq_norm": torch.ones(8), "dk_norm": torch.ones(8, dtype=torch.bfloat16)},
            "dk_norm is torch.bfloat16; wanted torch.float32",
        ),
    ],
)
def test_unsupported_backward_inputs_are_named(change, message):
    arguments = {"dq_THd": torch.zeros(2, 2, 8), "dk_TKd": torch.zeros(2, 1, 8), "dv_TKd": torch.zeros(2, 1, 8), **change}
    positional = [arguments.pop(name) for name in ("dq_THd", "dk_TKd", "dv_TKd")]
    with pytest.raises(UnsupportedError, match=message):
        op.rope_qkv_backward(*positional, None, None, None, **arguments)


def test_public_functions_refuse_unlike_shapes():
    cos, sin, positions = make_table(2, 8)
    with pytest.raises(UnsupportedError, match=r"q and k have shapes \(2, 2, 8\) and \(3, 1, 8\)"):
        op.rope(torch.zeros(2, 2, 8), torch.zeros(3, 1, 8), cos, sin, positions)
    q, k, weight = torch.zeros(2, 2, 8), torch.zeros(2, 1, 8), torch.ones(8)
    for wrong in (torch.arange(3), positions.view(2, 1, 1)):
        with pytest.raises(UnsupportedError, match=r"positions has shape .*; wanted \(2,\), or what expands to it"):
            op.rope(q, k, cos, sin, wrong)
        with pytest.raises(UnsupportedError, match="positions has shape"):
            op.qk_norm_rope(q, k, weight, weight, cos, sin, wrong, eps=EPS)


def test_public_functions_refuse_what_they_are_for_to_be_missing():
    q, k, positions = torch.zeros(2, 2, 8), torch.zeros(2, 1, 8), torch.arange(2)
    nothing: Any = None
    with pytest.raises(UnsupportedError, match="cos_PR and sin_PR are None; wanted the tables"):
        op.rope(q, k, nothing, nothing, positions)
    with pytest.raises(UnsupportedError, match="q_norm and k_norm are None; wanted both weights"):
        op.qk_norm_rope(q, k, nothing, nothing, None, None, None, eps=EPS)


def test_no_tokens_pass_the_public_functions():
    cos, sin, _ = make_table(2, 8)
    q, k = (torch.zeros(3, 0, heads, 8, requires_grad=True) for heads in (2, 1))
    turned = op.rope(q, k, cos, sin, torch.zeros(3, 0, dtype=torch.int64))
    torch.autograd.backward(turned, [torch.ones_like(x) for x in turned])
    assert q.grad is not None
    assert [x.shape for x in (*turned, q.grad)] == [q.shape, k.shape, q.shape]


def test_a_machine_without_triton_imports_the_operation():
    code = "import sys; sys.modules['triton'] = None; import finery_kernels.rope"
    subprocess.run([sys.executable, "-c", code], check=True)


def _signature(kernel, absent):
    types = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "rstd_ptr": "*fp32", "partial_ptr": "*fp32", "position_ptr": "*i32"}
    types |= {"num_positions": "i32", "num_rows": "i32", "eps": "fp32", "norm_offset": "fp32"}
    names = [name for name in kernel.arg_names if not name.isupper() and name not in absent]
    return {name: types.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in names}


def _order(kernel, arch, constants, *, absent=(), align=8, **options):
    values = {"Q_HEADS": 32, "K_HEADS": 8, "HALF": 64, "REST": 0, "HEADS_BLOCK": 8, "HALF_BLOCK": 64, "REST_BLOCK": 1, "HEAD_BLOCK": 128}
    values |= {"ALIGN": align, "ROTATE": True, "INVERSE": False, "COPY_REST": False, **constants}
    signature = _signature(kernel, absent)
    constexprs = {name: value for name, value in values.items() if name in kernel.arg_names} | dict.fromkeys(absent)
    heads = [name for name in signature if name.endswith("_head")]
    return compilation(kernel, signature, constexprs, arch, divisible=heads, num_warps=2, **options)


def _orders(arch):
    kernels = importlib.import_module("finery_kernels.rope.triton")
    partial = {"HALF": 12, "REST": 8, "HALF_BLOCK": 16, "REST_BLOCK": 8, "HEAD_BLOCK": 32, "COPY_REST": True}
    tables = ("cos_ptr", "sin_ptr", "position_ptr")
    usual = [
        _order(kernels.rotate_kernel, arch, {}, absent=("v_ptr", "v_out_ptr")),
        _order(kernels.rotate_kernel, arch, {"INVERSE": True}),
        _order(kernels.norm_rotate_kernel, arch, {}),
        _order(kernels.norm_rotate_backward_kernel, arch, {}),
        _order(kernels.norm_rotate_backward_kernel, arch, {}, absent=("partial_ptr",)),
        _order(kernels.norm_rotate_backward_kernel, arch, {}, maxnreg=kernels.LAUNCH.max_registers),
    ]
    if arch != max(ARCHITECTURES):
        return usual
    return [
        *usual,
        _order(kernels.rotate_kernel, arch, partial | {"INVERSE": True}, align=1),
        _order(kernels.rotate_kernel, arch, {"ROTATE": False}, absent=tables),
        _order(kernels.norm_rotate_kernel, arch, partial, absent=("q_pre_ptr", "k_pre_ptr"), align=1),
        _order(kernels.norm_rotate_kernel, arch, {"ROTATE": False}, absent=tables),
        _order(kernels.norm_rotate_backward_kernel, arch, partial, absent=("dv_ptr", "v_out_ptr"), align=1),
        _order(kernels.norm_rotate_backward_kernel, arch, {"ROTATE": False}, absent=tables),
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_and_move_16_bytes_at_a_time_where_rows_lie_8_elements_apart(arch):
    compiled = compile_all(_orders(arch))
    for kernel, groups in zip(compiled[:5], [(10, 10), (12, 12), (10, 20), (22, 12), (22, 12)], strict=True):
        assert (kernel.ptx.count("ld.global.v4"), kernel.ptx.count("st.global.v4")) == groups
    assert compiled.pop(5).stack_bytes <= 16
    assert [kernel.stack_bytes for kernel in compiled] == [0] * len(compiled)


GPU_SHAPES = [
    (2048, 32, 8, 128, 128),
    (515, 14, 2, 64, 64),
    (257, 16, 8, 256, 64),
    (33, 24, 8, 128, 96),
    (100, 9, 3, 80, 80),
    (64, 8, 1, 128, 0),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype", "norm"), [*itertools.product(GPU_SHAPES, DTYPES, [False, True])])
def test_raw_functions_keep_the_budget_on_a_gpu(shape, dtype, norm):
    options = {"num_positions": 8192, "index": torch.int32} if shape[4] else {}
    case = make_case(shape, dtype, norm=norm, device="cuda", **options)
    names = ("row", "gradient", "dq_norm", "dk_norm")
    for name, got, oracle, plain in zip(names, run_public(case), eager(case, torch.float64), eager(case, dtype), strict=False):
        assert_within_budget(got, oracle, plain, factor=budget(dtype, norm=norm), name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_public_functions_agree_with_the_raw_ones_on_a_gpu(norm):
    case = make_case((300, 8, 2, 64, 48), torch.bfloat16, norm=norm, device="cuda")
    assert case.table is not None
    row, gradient = run_public(case)[:2]
    q, k = (x.detach().clone().requires_grad_() for x in split(case.qkv, case.heads)[:2])
    if case.weights is None:
        outputs = op.rope(q, k, *case.table)
    else:
        outputs = op.qk_norm_rope(q, k, *case.weights, *case.table, eps=EPS)
    torch.autograd.backward(outputs, split(case.gradient, case.heads)[:2])
    for got, want in zip((*outputs, q.grad, k.grad), (*split(row, case.heads)[:2], *split(gradient, case.heads)[:2]), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_a_gpu_repeats_itself_bit_by_bit(norm):
    case = make_case((4099, 32, 8, 128, 128), torch.bfloat16, norm=norm, device="cuda", num_positions=8192)
    runs = [run_public(case) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements_are_reached():
    num_rows, row_stride = 70_000, 32_768
    buffer = torch.zeros(num_rows, row_stride, dtype=torch.bfloat16, device="cuda")
    cos, sin, positions = make_table(num_rows, 64, device="cuda")
    qkv, out = buffer[:, :256], buffer[:, 256:512]
    qkv[-1] = 1.0
    want = qkv[-1:].clone()
    op.rope_qkv_forward_(qkv, cos, sin, positions, num_heads=2, num_kv_heads=1, head_dim=64)
    op.rope_qkv_forward_(want, cos, sin, positions[-1:], num_heads=2, num_kv_heads=1, head_dim=64)
    assert torch.equal(qkv[-1:], want)
    op.rope_qkv_backward(*split(qkv, (2, 1)), cos, sin, positions, out_TN=out)
    torch.testing.assert_close(out[-1], torch.ones_like(out[-1]), rtol=0.02, atol=0.02)
    assert not qkv[:-1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_a_captured_graph_replays_forward_and_backward(norm):
    case = make_case((300, 8, 2, 128, 128), torch.bfloat16, norm=norm, device="cuda")
    table, parts, rows = case.table, split(case.gradient, case.heads), case.qkv.clone()
    assert table is not None
    dweights = tuple(torch.zeros(128, device="cuda") for _ in range(2))

    def step():
        rows.copy_(case.qkv)
        rstd = op.rope_qkv_forward_(rows, *table, **forward_options(case))
        options = {}
        if case.weights is not None:
            options = {"q_norm": case.weights[0], "k_norm": case.weights[1], "pre_TN": case.qkv, "rstd_TG": rstd}
            options |= {"dq_norm": dweights[0].zero_(), "dk_norm": dweights[1].zero_()}
        return rows, op.rope_qkv_backward(*parts, *table, **options), *dweights

    want = [tensor.clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    rows.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
