"""Stacked LoRA projections against fp64: one node for all members, odd ranks, members without adapter, strided buffers, wrong operands."""

from __future__ import annotations

import pytest
import torch

from finery_kernels.errors import UnsupportedError
from finery_kernels.lora import (
    Adapter,
    StackedLayout,
    lora_backward_adapters,
    lora_backward_input,
    lora_down,
    lora_forward,
    lora_projection,
    pack_adapters_,
    reference,
)
from finery_kernels.testing import assert_within_budget, poisoned, random_normal

MEMBERS = {
    "q/k/v": ((24, 8, 8), (4, 4, 4)),
    "gate/up of unlike ranks": ((40, 40), (3, 8)),
    "one": ((16,), (5,)),
    "one adapter of three": ((24, 8, 8), (0, 4, 0)),
    "no adapter": ((16, 8), (0, 0)),
}
SCALING = 1.5


def operands(name, dtype, *, num_rows=37, num_inputs=48, device="cpu"):
    """x [T, K], weights, adapters (fp32, but for fp64 inputs) and dy [T, N]."""
    outputs, ranks = MEMBERS[name]
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x = random_normal(num_rows, num_inputs, seed=1, dtype=dtype, device=device)
    weights = [random_normal(n, num_inputs, seed=10 + i, dtype=dtype, device=device, scale=0.2) for i, n in enumerate(outputs)]
    adapters = [
        None
        if rank == 0
        else Adapter(
            random_normal(rank, num_inputs, seed=20 + i, dtype=factor_dtype, device=device, scale=0.2),
            random_normal(n, rank, seed=30 + i, dtype=factor_dtype, device=device, scale=0.2),
            SCALING,
        )
        for i, (n, rank) in enumerate(zip(outputs, ranks, strict=True))
    ]
    return x, weights, adapters, random_normal(num_rows, sum(outputs), seed=2, dtype=dtype, device=device)


def leaves(x, adapters, dtype):
    """x and the factors as leaves of `dtype` (the factors stay fp32 beside 16-bit inputs), and the adapters made of them."""
    factor_dtype = dtype if dtype == torch.float64 else torch.float32
    x = x.detach().to(dtype).requires_grad_()
    made = [
        None
        if a is None
        else Adapter(a.a.detach().to(factor_dtype).requires_grad_(), a.b.detach().to(factor_dtype).requires_grad_(), a.scaling)
        for a in adapters
    ]
    return x, made, [x, *(factor for a in made if a is not None for factor in (a.a, a.b))]


def eager(x, weights, adapters, dy, dtype):
    """Output and gradients as PEFT computes them in `dtype`."""
    x, made, wanted = leaves(x, adapters, dtype)
    y = reference.lora_projection(x, [w.to(dtype) for w in weights], [None if a is None else tuple(a) for a in made], [None] * len(weights))
    return y.detach(), torch.autograd.grad(y, wanted, dy.to(dtype))


def check(name, dtype, device):
    x, weights, adapters, dy = operands(name, dtype, device=device)
    exact_y, exact = eager(x, weights, adapters, dy, torch.float64)
    plain_y, plain = eager(x, weights, adapters, dy, dtype)
    x, made, wanted = leaves(x, adapters, dtype)
    y = lora_projection(x, weights, made)
    got = torch.autograd.grad(y, wanted, dy)
    assert_within_budget(y.detach(), exact_y, plain_y, factor=1.2, name="y")
    for index, (each, oracle, low) in enumerate(zip(got, exact, plain, strict=True)):
        assert_within_budget(each, oracle, low, factor=1.2, name=f"gradient {index}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", list(MEMBERS))
def test_output_and_gradients_keep_the_budget(name, dtype):
    check(name, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(MEMBERS))
def test_output_and_gradients_keep_the_budget_on_a_gpu(name, dtype):
    check(name, dtype, "cuda")


def runs(device, dtype):
    """Output and gradients of the same inputs, again and again."""
    x, weights, adapters, dy = operands("gate/up of unlike ranks", dtype, num_rows=515, device=device)
    x, made, wanted = leaves(x, adapters, dtype)
    for _ in range(3):
        y = lora_projection(x, weights, made)
        yield y, *torch.autograd.grad(y, wanted, dy)


def test_runs_repeat_bit_by_bit():
    first, *others = runs("cpu", torch.bfloat16)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
def test_a_gpu_repeats_itself_bit_by_bit():
    first, *others = runs("cuda", torch.bfloat16)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_no_rows_give_no_rows():
    x, weights, adapters, dy = operands("q/k/v", torch.float32, num_rows=0)
    x, made, wanted = leaves(x, adapters, torch.float32)
    y = lora_projection(x, weights, made)
    dx, *factors = torch.autograd.grad(y, wanted, dy)
    assert (y.shape, dx.shape) == ((0, 40), (0, 48))
    assert not any(factor.any() for factor in factors)


def test_gradients_are_those_of_the_function():
    x, weights, adapters, _ = operands("q/k/v", torch.float64, num_rows=3)
    x, made, wanted = leaves(x, adapters, torch.float64)
    biases = [torch.randn(len(w), dtype=torch.float64) for w in weights]

    def of(*values):
        factors = iter(values[1:])
        return lora_projection(values[0], weights, [Adapter(next(factors), next(factors), SCALING) for _ in made], biases)

    torch.autograd.gradcheck(of, wanted)


def test_a_bias_is_added_to_its_member():
    x, weights, adapters, _ = operands("q/k/v", torch.float32)
    bias = torch.randn(8)
    without, with_bias = (lora_projection(x, weights, adapters, [None, b, None]) for b in (None, bias))
    torch.testing.assert_close(with_bias[:, 24:32], without[:, 24:32] + bias)
    assert torch.equal(with_bias[:, :24], without[:, :24])


def test_the_raw_functions_write_whole_views_of_wider_buffers_and_add_to_gradients():
    x, weights, adapters, dy = operands("gate/up of unlike ranks", torch.float32)
    layout = StackedLayout(48, (40, 40), (3, 8))
    assert (layout.num_ranks, layout.shape) == (16, (96, 64))
    weight_ext = torch.zeros(layout.shape)
    for member, weight in enumerate(weights):
        weight_ext[layout.rows(member), :48] = weight
    pack_adapters_(weight_ext, layout, adapters)
    x_ext, y_wide = poisoned(37, 64, dtype=torch.float32), poisoned(37, 96, dtype=torch.float32)
    x_ext[:, :48] = x
    lora_down(x, weight_ext, layout, out=x_ext[:, 48:])
    lora_forward(x_ext, weight_ext, layout, out=y_wide[:, :80])
    torch.testing.assert_close(y_wide[:, :80], lora_projection(x, weights, adapters))
    assert y_wide[:, 80:].isnan().all()

    y_wide[:, :80] = dy
    dx = lora_backward_input(y_wide, weight_ext, layout, scale=2.0)
    grads = [Adapter(torch.ones_like(a.a), torch.ones_like(a.b), a.scaling) for a in adapters if a is not None]
    lora_backward_adapters(y_wide, x, x_ext[:, 48:], layout, grads, scale=2.0)
    exact_dx, *exact = eager(x, weights, adapters, 2 * dy, torch.float64)[1]
    torch.testing.assert_close(dx.double(), exact_dx, rtol=1e-4, atol=1e-5)
    for got, wanted in zip((factor for grad in grads for factor in (grad.a, grad.b)), exact, strict=True):
        torch.testing.assert_close(got.double(), 1 + wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_was_never_written_reaches_no_product(dtype):
    layout = StackedLayout(80, (80,), (3,))
    weight_ext = torch.zeros(layout.shape, dtype=dtype)
    weight_ext[:80, :80] = random_normal(80, 80, seed=1, dtype=dtype)
    pack_adapters_(weight_ext, layout, [Adapter(random_normal(3, 80, seed=2), random_normal(80, 3, seed=3), SCALING)])
    x_ext, dy_ext = (poisoned(64, 88, dtype=dtype) for _ in range(2))
    x_ext[:, :80] = dy_ext[:, :80] = random_normal(64, 80, seed=4, dtype=dtype)
    lora_down(x_ext[:, :80], weight_ext, layout, out=x_ext[:, 80:])
    for got in (x_ext, lora_forward(x_ext, weight_ext, layout), lora_backward_input(dy_ext, weight_ext, layout), dy_ext):
        assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda x, w, a: (x[0], w, a), "x: got torch.float32 of 1 dimensions, wanted 2"),
        (lambda x, w, a: (x.int(), [each.int() for each in w], a), "x: got torch.int32 of 2 dimensions, wanted 2"),
        (lambda x, w, a: (x, [w[0].sum(), *w[1:]], a), r"weights\[0\]: got shape \(\), wanted two dimensions"),
        (lambda x, w, a: (x, w, [Adapter(a[0].a[0], a[0].b, 1.0), *a[1:]]), r"adapters\[0\].a: got shape \(48,\), wanted two"),
        (lambda x, w, a: (x, [w[0][:, :-1], *w[1:]], a), r"weights\[0\]: got shape \(24, 47\), wanted \(24, 48\)"),
        (lambda x, w, a: (x, [w[0].double(), *w[1:]], a), r"weights\[0\]: got torch.float64"),
        (lambda x, w, a: (x, w, a[:2]), "got 3, 2 and 3"),
        (lambda x, w, a: (x, w, [Adapter(a[0].a[:, 1:], a[0].b, 1.0), *a[1:]]), r"adapters\[0\].a: got shape \(4, 47\)"),
        (lambda x, w, a: (x, w, [Adapter(a[0].a, a[0].b[:, 1:], 1.0), *a[1:]]), r"adapters\[0\].b: got shape \(24, 3\)"),
        (lambda x, w, a: (x, w, [Adapter(a[0].a.int(), a[0].b, 1.0), *a[1:]]), r"adapters\[0\].a: got torch.int32"),
    ],
)
def test_operands_that_do_not_fit_are_named(spoil, text):
    x, weights, adapters, _ = operands("q/k/v", torch.float32)
    with pytest.raises(UnsupportedError, match=text):
        lora_projection(*spoil(x, weights, adapters))


RAW_LAYOUT = StackedLayout(6, (5, 4), (2, 0))
RAW = {
    pack_adapters_: ("weight_ext", "layout", "adapters"),
    lora_down: ("x_TK", "weight_ext", "layout", "out"),
    lora_forward: ("x_ext", "weight_ext", "layout", "bias_N", "out"),
    lora_backward_input: ("dy_ext", "weight_ext", "layout", "out"),
    lora_backward_adapters: ("dy_ext", "x_TK", "xa_TR", "layout", "grads"),
}


def call_raw(function, **change):
    """Calls it with tensors that fit 3 rows of `RAW_LAYOUT`, but for `change`."""
    factors = [Adapter(torch.zeros(2, 6), torch.zeros(5, 2), SCALING), None]
    num_outputs = {lora_down: 8, lora_forward: 9, lora_backward_input: 6}.get(function, 0)
    tensors = {"x_TK": torch.zeros(3, 6), "xa_TR": torch.zeros(3, 8), "x_ext": torch.zeros(3, 14), "dy_ext": torch.zeros(3, 17)}
    tensors |= {"weight_ext": torch.zeros(17, 14), "bias_N": torch.zeros(9), "out": torch.zeros(3, num_outputs)}
    given = {**tensors, "layout": RAW_LAYOUT, "adapters": factors, "grads": factors, **change}
    names = RAW[function]
    split = names.index("layout") + 1 + (names[-1] in ("adapters", "grads"))
    return function(*(given[name] for name in names[:split]), **{name: given[name] for name in names[split:]})


def adapters_of(*, a=(2, 6), b=(5, 2), **options):
    return [Adapter(torch.zeros(a, **options), torch.zeros(b, **options), SCALING), None]


@pytest.mark.parametrize(
    ("function", "change", "text"),
    [
        (pack_adapters_, {"weight_ext": torch.zeros(17, 13)}, r"weight_ext: got shape \(17, 13\), wanted \(17, 14\)"),
        (pack_adapters_, {"adapters": adapters_of(a=(1, 6))}, r"adapters\[0\].a: got shape \(1, 6\), wanted \(2, 6\)"),
        (pack_adapters_, {"adapters": adapters_of(b=(5, 1))}, r"adapters\[0\].b: got shape \(5, 1\), wanted \(5, 2\)"),
        (pack_adapters_, {"adapters": adapters_of(dtype=torch.int32)}, r"adapters\[0\].a: got torch.int32 on cpu, wanted a floating"),
        (pack_adapters_, {"adapters": adapters_of(device="meta")}, r"adapters\[0\].a: got torch.float32 on meta, wanted .* on cpu"),
        (pack_adapters_, {"adapters": adapters_of()[::-1]}, r"adapters\[1\].a: got shape \(2, 6\), wanted \(0, 6\)"),
        (pack_adapters_, {"adapters": adapters_of()[:1]}, "adapters: got 1, wanted 2, one or None for every member"),
        (lora_down, {"x_TK": torch.zeros(3, 7)}, r"x_TK: got shape \(3, 7\), wanted 6 columns"),
        (lora_down, {"x_TK": torch.zeros(6)}, r"x_TK: got shape \(6,\), wanted two dimensions"),
        (lora_down, {"weight_ext": torch.zeros(17, 14).double()}, "weight_ext: got torch.float64 on cpu, wanted torch.float32 on cpu"),
        (lora_down, {"out": torch.empty(2, 8)}, r"out: got shape \(2, 8\), wanted \(3, 8\)"),
        (lora_forward, {"x_ext": torch.zeros(3, 15)}, r"x_ext: got shape \(3, 15\), wanted 14 columns"),
        (lora_forward, {"weight_ext": torch.zeros(18, 14)}, r"weight_ext: got shape \(18, 14\), wanted \(17, 14\)"),
        (lora_forward, {"bias_N": torch.ones(1)}, r"bias_N: got shape \(1,\), wanted \(9,\)"),
        (lora_forward, {"bias_N": torch.ones(9).int()}, "bias_N: got torch.int32 on cpu, wanted a floating dtype on cpu"),
        (lora_forward, {"out": torch.zeros(4, 9)}, r"out: got shape \(4, 9\), wanted \(3, 9\)"),
        (lora_forward, {"out": torch.zeros(3, 9).half()}, "out: got torch.float16 on cpu, wanted torch.float32"),
        (lora_backward_input, {"dy_ext": torch.zeros(3, 18)}, r"dy_ext: got shape \(3, 18\), wanted 17 columns"),
        (lora_backward_input, {"weight_ext": torch.zeros(17, 14, device="meta")}, "weight_ext: got torch.float32 on meta"),
        (lora_backward_input, {"out": torch.zeros(3, 5)}, r"out: got shape \(3, 5\), wanted \(3, 6\)"),
        (lora_backward_adapters, {"dy_ext": torch.zeros(3, 16)}, r"dy_ext: got shape \(3, 16\), wanted 17 columns or more"),
        (lora_backward_adapters, {"x_TK": torch.zeros(2, 6)}, r"x_TK: got shape \(2, 6\), wanted \(3, 6\)"),
        (lora_backward_adapters, {"xa_TR": torch.zeros(3, 2)}, r"xa_TR: got shape \(3, 2\), wanted \(3, 8\)"),
        (lora_backward_adapters, {"grads": adapters_of(a=(1, 6))}, r"grads\[0\].a: got shape \(1, 6\), wanted \(2, 6\)"),
    ],
)
def test_operands_of_the_raw_functions_that_do_not_fit_are_named(function, change, text):
    call_raw(function)
    with pytest.raises(UnsupportedError, match=text):
        call_raw(function, **change)


def test_gradients_wider_than_the_layout_and_biases_of_another_dtype_fit():
    call_raw(lora_backward_adapters, dy_ext=torch.zeros(3, 25))
    assert torch.equal(call_raw(lora_forward, bias_N=torch.ones(9).double()), torch.ones(3, 9))
