"""LayerNorm against fp64: reference and kernel, forward and backward, with and without a residual, odd widths, strided rows."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass

import pytest
import torch

from finery_kernels import layer_norm as op
from finery_kernels.errors import UnsupportedError
from finery_kernels.layer_norm import reference
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
SHAPES = [(1, 130), (3, 7), (5, 64), (9, 100), (2, 576)]
EPS = 1e-5
IMPLEMENTATIONS = ["reference", "triton"]


@dataclass
class Case:
    """Inputs in the dtype under test; every use makes its own copies."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    dy: torch.Tensor
    dresidual: torch.Tensor | None
    offset: float


def budget(dtype):
    """Factor on the eager error: fp32 has no wider dtype inside, so there it is the same number of roundings in another order."""
    return (1.5 if dtype == torch.float32 else 1.1) * truncation_factor(dtype)


def make_case(num_rows, num_columns, dtype, *, seed=0, residual=True, offset=0.0, device="cpu", weight_dtype=None):
    def draw(index):
        return random_normal(num_rows, num_columns, seed=10 * seed + index, dtype=dtype, device=device)

    weight = random_normal(num_columns, seed=10 * seed, dtype=weight_dtype or dtype, device=device, scale=0.3, mean=1.0 - offset)
    bias = random_normal(num_columns, seed=10 * seed + 5, dtype=weight_dtype or dtype, device=device, scale=0.3)
    return Case(draw(1), draw(2) if residual else None, weight, bias, draw(3), draw(4) if residual else None, offset)


def implementation(name):
    """The raw functions of one implementation and the device they run on; the kernel is interpreted where there is no GPU."""
    module = importlib.import_module(f"finery_kernels.layer_norm.{name}")
    return module, kernel_device() if name == "triton" else torch.device("cpu")


def eager(case, dtype):
    """Plain torch in `dtype`, every operation rounding: y, s, dx, dweight, dbias by autograd. In fp64 this is the oracle."""
    x, weight, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in (case.x, case.weight, case.bias))
    s = x if case.residual is None else x + case.residual.to(dtype)
    centred = s - s.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS) * (weight + case.offset) + bias
    torch.autograd.backward([y] if case.dresidual is None else [y, s], [g.to(dtype) for g in (case.dy, case.dresidual) if g is not None])
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    return y.detach(), s.detach(), x.grad, weight.grad, bias.grad


def run(module, case, *, dweight=None, dbias=None, **buffers):
    options = {"residual_TD": case.residual, "out": buffers.get("y"), "residual_out": buffers.get("s")}
    y, s, mean, rstd = module.layer_norm_forward(case.x, case.weight, case.bias, eps=EPS, offset=case.offset, **options)
    options = {"dresidual_TD": case.dresidual, "out": buffers.get("dx"), "dweight_D": dweight, "dbias_D": dbias}
    dx = module.layer_norm_backward(case.dy, s, case.weight, mean, rstd, offset=case.offset, **options)
    return y, s, mean, rstd, dx


@pytest.mark.parametrize(("name", "dtype", "residual"), [*itertools.product(IMPLEMENTATIONS, DTYPES, [False, True])])
def test_forward_and_backward_err_no_more_than_eager_torch(name, dtype, residual):
    module, device = implementation(name)
    for seed, (num_rows, num_columns) in enumerate(SHAPES):
        case = make_case(num_rows, num_columns, dtype, seed=seed, residual=residual, offset=seed % 2, device=device)
        buffers = {key: poisoned(num_rows, num_columns, dtype=dtype, device=device) for key in ("y", "dx", *("s",) * residual)}
        dweight, dbias = torch.zeros(2, num_columns, device=device)
        y, s, _, _, dx = run(module, case, dweight=dweight, dbias=dbias, **buffers)
        assert y is buffers["y"]
        assert dx is buffers["dx"]
        assert s is (buffers["s"] if residual else case.x)
        got = {"y": y, "s": s, "dx": dx, "dweight": dweight, "dbias": dbias}
        for (key, value), oracle, plain in zip(got.items(), eager(case, torch.float64), eager(case, dtype), strict=True):
            assert_within_budget(value, oracle, plain, factor=budget(dtype), name=f"{key} {num_rows}x{num_columns}")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_may_lie_apart_and_the_gaps_are_left_alone(name):
    module, device = implementation(name)
    plain = make_case(6, 48, torch.float32, device=device)
    want = run(module, plain)
    apart = Case(
        strided(plain.x, row_stride=80),
        strided(plain.residual, row_stride=49),
        plain.weight,
        plain.bias,
        strided(plain.dy, row_stride=64),
        strided(plain.dresidual, row_stride=51),
        plain.offset,
    )
    strides = {"y": 56, "s": 57, "dx": 62}
    buffers = {key: poisoned(6, 48, dtype=torch.float32, device=device, row_stride=stride) for key, stride in strides.items()}
    for got, expected in zip(run(module, apart, **buffers), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    for buffer in buffers.values():
        assert_padding_untouched(buffer)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_sum_is_rounded_before_it_is_normalised(name):
    module, device = implementation(name)
    case = make_case(5, 96, torch.float16, device=device)
    y, s, *_ = run(module, case)
    options = {"eps": EPS, "offset": case.offset, "residual_TD": None, "out": None, "residual_out": None}
    again = module.layer_norm_forward(s, case.weight, case.bias, **options)[0]
    # Without the rounding a fifth differs; a sum in another order may flip one.
    assert (y != again).double().mean() < 0.01


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_outputs_may_overwrite_inputs(name):
    module, device = implementation(name)
    case = make_case(4, 40, torch.float32, device=device)
    want = run(module, case)
    got = run(module, case, y=case.x, s=case.residual, dx=case.dresidual)
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_parameter_gradients_are_added_in_the_same_order_every_time(name):
    module, device = implementation(name)
    case = make_case(11, 72, torch.float32, device=device)
    start = random_normal(72, seed=5, device=device)
    totals = []
    for _ in range(2):
        dweight, dbias = start.clone(), start.clone()
        run(module, case, dweight=dweight, dbias=dbias)
        totals.append((dweight, dbias))
    for first, second, oracle, plain in zip(*totals, eager(case, torch.float64)[3:], eager(case, torch.float32)[3:], strict=True):
        assert torch.equal(first, second)
        assert_within_budget(first, start.double() + oracle, start + plain, factor=budget(torch.float32))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_weight_bias_and_their_gradients_may_each_be_missing(name):
    module, device = implementation(name)
    case = make_case(4, 24, torch.float32, device=device, residual=False)
    ones, zeros = torch.ones(24, device=device), torch.zeros(24, device=device)
    options = {"offset": 0.0, "residual_TD": None, "out": None, "residual_out": None}
    for weight, bias in itertools.product((None, case.weight), (None, case.bias)):
        full = ones if weight is None else weight, zeros if bias is None else bias
        y, s, mean, rstd = module.layer_norm_forward(case.x, weight, bias, eps=EPS, **options)
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(case.x, (24,), *full, EPS), rtol=1e-5, atol=1e-6)
        want = run(
            module, Case(case.x, None, *full, case.dy, None, 0.0), dweight=(dweight := zeros.clone()), dbias=(dbias := zeros.clone())
        )[-1]
        for wants_weight, wants_bias in itertools.product((False, True), (False, True)):
            got_dweight, got_dbias = zeros.clone() if wants_weight else None, zeros.clone() if wants_bias else None
            gradients = {"dresidual_TD": None, "out": None, "dweight_D": got_dweight, "dbias_D": got_dbias}
            got = module.layer_norm_backward(case.dy, s, weight, mean, rstd, offset=0.0, **gradients)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
            assert got_dweight is None or torch.allclose(got_dweight, dweight)
            assert got_dbias is None or torch.allclose(got_dbias, dbias)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_parameters_may_be_wider_than_the_activations(name):
    module, device = implementation(name)
    case = make_case(4, 64, torch.float16, device=device, weight_dtype=torch.float32)
    y, _, _, _, dx = run(module, case)
    oracle, plain = eager(case, torch.float64), eager(case, torch.float16)
    assert_within_budget(y, oracle[0], plain[0], factor=1.1, name="y")
    assert_within_budget(dx, oracle[2], plain[2], factor=1.1, name="dx")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_large_mean_does_not_swallow_the_variance(name):
    module, device = implementation(name)
    case = make_case(3, 100, torch.float32, device=device, residual=False)
    case.x += 1000.0
    y, *_ = run(module, case)
    assert_within_budget(y, eager(case, torch.float64)[0], eager(case, torch.float32)[0], factor=budget(torch.float32))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_constant_row_normalises_to_the_bias(name):
    module, device = implementation(name)
    case = make_case(3, 50, torch.float32, device=device, residual=False)
    case.x.fill_(0.5)
    y, *_, dx = run(module, case)
    torch.testing.assert_close(y, case.bias.expand(3, 50), rtol=1e-6, atol=0)
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_rows_are_fine(name):
    module, device = implementation(name)
    case = make_case(0, 16, torch.float32, device=device)
    dweight, dbias = torch.ones(2, 16, device=device)
    got = run(module, case, dweight=dweight, dbias=dbias)
    assert [tuple(tensor.shape) for tensor in got] == [(0, 16), (0, 16), (0,), (0,), (0, 16)]
    assert torch.equal(dweight + dbias, torch.full((16,), 2.0, device=device))


def test_kernel_and_reference_agree_row_by_row():
    module, device = implementation("triton")
    case = make_case(13, 33, torch.float32, device=device)
    for got, want in zip(run(module, case), run(reference, case), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_gradients_of_the_public_functions_are_those_of_fp64_torch():
    x, residual = (random_normal(2, 3, 7, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2))
    weight, bias = (random_normal(7, seed=seed, dtype=torch.float64).requires_grad_() for seed in (3, 4))
    assert torch.autograd.gradcheck(lambda *args: op.layer_norm(*args, eps=EPS, offset=1.0), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *args: op.layer_norm(*args, None, None, eps=EPS), (x,))
    assert torch.autograd.gradcheck(lambda *args: op.add_layer_norm(*args, eps=EPS), (x, residual, weight, bias))
    torch.testing.assert_close(op.layer_norm(x, weight, bias, eps=EPS), torch.nn.functional.layer_norm(x, (7,), weight, bias, EPS))


def test_public_functions_take_layouts_without_rows():
    x = random_normal(4, 6, seed=1).t().requires_grad_()
    weight = torch.ones(4, requires_grad=True)
    op.layer_norm(x, weight, None, eps=EPS).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    y, _ = op.add_layer_norm(x, x, weight, None, eps=EPS)
    y.sum().backward()
    _, s = op.add_layer_norm(x, x, weight, None, eps=EPS)
    s.sum().backward()


def test_frozen_parameters_cost_no_gradient():
    x = random_normal(3, 8, seed=1).requires_grad_()
    weight, bias = torch.ones(8), torch.zeros(8, requires_grad=True)
    op.layer_norm(x, weight, bias, eps=EPS).sum().backward()
    assert weight.grad is None
    assert torch.equal(bias.grad, torch.full((8,), 3.0))


def test_raw_functions_build_no_graph():
    x = random_normal(3, 8, seed=1).requires_grad_()
    outputs = op.layer_norm_forward(x, torch.ones(8, requires_grad=True), None, eps=EPS)
    assert not any(tensor.requires_grad for tensor in (outputs[0], *outputs[2:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TD": torch.zeros(2, 3, 8)}, r"x_TD: shape \(2, 3, 8\), wanted \[T, D\]"),
        ({"x_TD": torch.zeros(8, 2).t()}, r"x_TD: strides \(1, 2\), wanted unit stride"),
        ({"weight_D": torch.ones(7)}, r"weight_D: shape \(7,\), wanted \(8,\)"),
        ({"bias_D": torch.ones(16)[::2]}, r"bias_D: stride \(2,\), wanted a contiguous"),
        ({"bias_D": torch.ones(8, dtype=torch.int64)}, "bias_D: torch.int64"),
        ({"residual_TD": torch.zeros(2, 8, dtype=torch.bfloat16)}, "residual_TD: torch.bfloat16, wanted torch.float32"),
        ({"residual_out": torch.zeros(2, 8)}, "residual_out: given without residual_TD"),
        ({"out": torch.zeros(2, 8, device="meta")}, "out: on meta, wanted cpu"),
    ],
)
def test_unsupported_forward_inputs_are_named(change, message):
    arguments = {"x_TD": torch.zeros(2, 8), "weight_D": torch.ones(8), "bias_D": torch.ones(8), **change}
    positional = [arguments.pop(name) for name in ("x_TD", "weight_D", "bias_D")]
    with pytest.raises(UnsupportedError, match=message):
        op.layer_norm_forward(*positional, eps=EPS, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_T": torch.ones(3)}, r"mean_T: shape \(3,\), wanted \(2,\)"),
        ({"rstd_T": torch.ones(2, dtype=torch.bfloat16)}, "rstd_T: torch.bfloat16, wanted torch.float32"),
        ({"dy_TD": torch.zeros(2, 8, dtype=torch.float16)}, "dy_TD: torch.float16, wanted torch.float32"),
        ({"dresidual_TD": torch.zeros(2, 7)}, r"dresidual_TD: shape \(2, 7\)"),
        ({"dbias_D": torch.zeros(8, dtype=torch.bfloat16)}, "dbias_D: torch.bfloat16, wanted torch.float32"),
        ({"out": torch.zeros(8, 2).t()}, r"out: strides \(1, 2\)"),
    ],
)
def test_unsupported_backward_inputs_are_named(change, message):
    names = ("dy_TD", "s_TD", "weight_D", "mean_T", "rstd_T")
    arguments = dict(zip(names, (torch.zeros(2, 8), torch.zeros(2, 8), torch.ones(8), torch.ones(2), torch.ones(2)), strict=True)) | change
    positional = [arguments.pop(name) for name in names]
    with pytest.raises(UnsupportedError, match=message):
        op.layer_norm_backward(*positional, **arguments)


def test_public_functions_refuse_scalars_and_unlike_shapes():
    with pytest.raises(UnsupportedError, match="x: a scalar"):
        op.layer_norm(torch.tensor(1.0), torch.ones(1), None, eps=EPS)
    with pytest.raises(UnsupportedError, match=r"residual: shape \(1, 8\), wanted that of x, \(2, 8\)"):
        op.add_layer_norm(torch.zeros(2, 8), torch.zeros(1, 8), torch.ones(8), None, eps=EPS)


def _orders(arch):
    kernels = importlib.import_module("finery_kernels.layer_norm.triton")
    forward_strides = dict.fromkeys(["x_stride", "residual_stride", "y_stride", "sum_stride"], "i32")
    backward_strides = dict.fromkeys(["dy_stride", "s_stride", "dresidual_stride", "dx_stride"], "i64")
    statistics = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    forward = dict.fromkeys(["x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr", "sum_ptr"], "*bf16") | statistics
    forward |= forward_strides | {"eps": "fp32", "offset": "fp32"}
    backward = dict.fromkeys(["dy_ptr", "s_ptr", "weight_ptr", "dresidual_ptr", "dx_ptr"], "*bf16") | statistics
    backward |= backward_strides | {"offset": "fp32"}
    parameters = backward | {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "num_rows": "i32"}
    wide, odd = {"D": 4096, "BLOCK": 4096}, {"D": 576, "BLOCK": 1024}
    bare = odd | {"weight_ptr": None, "dresidual_ptr": None}
    return [
        compilation(kernels.forward_kernel, forward, wide, arch, divisible=[*forward_strides], num_warps=8),
        compilation(kernels.forward_kernel, forward, odd | dict.fromkeys(["residual_ptr", "weight_ptr", "bias_ptr"]), arch, num_warps=2),
        compilation(kernels.backward_kernel, backward, wide, arch, divisible=[*backward_strides], num_warps=8),
        compilation(kernels.backward_kernel, backward, bare, arch, num_warps=2),
        compilation(kernels.backward_parameters_kernel, parameters, wide | {"STAGES": 3}, arch, divisible=[*backward_strides], num_warps=8),
        compilation(kernels.backward_parameters_kernel, parameters, bare | {"STAGES": 4, "dbias_ptr": None}, arch, num_warps=2),
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_and_move_16_bytes_at_a_time(arch):
    forward, _, backward, *_ = compiled = compile_all(_orders(arch))
    assert [kernel.stack_bytes for kernel in compiled] == [0] * len(compiled), "nothing is spilled"
    for kernel in (forward, backward):
        assert "ld.global.v4" in kernel.ptx
        assert "st.global.v4" in kernel.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_columns"), [(2048, 4096), (515, 2880), (33, 14336), (257, 128), (9, 16384), (3, 40000), (1, 65536)]
)
def test_public_functions_keep_the_budget_on_a_gpu(dtype, num_rows, num_columns):
    case = make_case(num_rows, num_columns, dtype, device="cuda")
    assert case.residual is not None
    leaves = [tensor.clone().requires_grad_() for tensor in (case.x, case.residual, case.weight, case.bias)]
    y, s = op.add_layer_norm(*leaves, eps=EPS)
    torch.autograd.backward([y, s], [case.dy, case.dresidual])
    dx, dresidual, dweight, dbias = (leaf.grad for leaf in leaves)
    assert dx is not None
    assert dweight is not None
    assert dbias is not None
    got = (y.detach(), s.detach(), dx, dweight, dbias)
    for value, oracle, plain in zip(got, eager(case, torch.float64), eager(case, dtype), strict=True):
        assert_within_budget(value, oracle, plain, factor=budget(dtype))
    assert torch.equal(dx, dresidual)


def test_the_norm_and_the_sum_are_not_written_to_one_place():
    x, ones, wide = torch.zeros(2, 8), torch.ones(8), torch.zeros(2, 12)
    for out, residual_out in ((x, x), (wide[:, :8], wide[:, 4:])):
        options = {"eps": EPS, "residual_TD": torch.zeros(2, 8), "out": out, "residual_out": residual_out}
        with pytest.raises(UnsupportedError, match="out overlaps residual_out; wanted memory of its own"):
            op.layer_norm_forward(x, ones, None, **options)


@pytest.mark.gpu
def test_a_gpu_repeats_itself_bit_by_bit():
    case = make_case(4099, 4096, torch.bfloat16, device="cuda")
    runs = []
    for _ in range(3):
        dweight, dbias = torch.zeros(2, 4096, device="cuda")
        y, s, mean, rstd = op.layer_norm_forward(case.x, case.weight, case.bias, eps=EPS, residual_TD=case.residual)
        options = {"dresidual_TD": case.dresidual, "dweight_D": dweight, "dbias_D": dbias}
        dx = op.layer_norm_backward(case.dy, s, case.weight, mean, rstd, **options)
        runs.append((y, s, mean, rstd, dx, dweight, dbias))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_a_captured_graph_replays_forward_and_backward():
    case = make_case(300, 1024, torch.bfloat16, device="cuda")
    dweight, dbias = torch.zeros(2, 1024, device="cuda")

    def step():
        y, s, mean, rstd = op.layer_norm_forward(case.x, case.weight, case.bias, eps=EPS, residual_TD=case.residual)
        options = {"dresidual_TD": case.dresidual, "dweight_D": dweight, "dbias_D": dbias}
        return y, op.layer_norm_backward(case.dy, s, case.weight, mean, rstd, **options)

    want = [tensor.clone() for tensor in step()]
    once = dweight.clone(), dbias.clone()
    dweight.zero_()
    dbias.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip((*got, dweight, dbias), (*want, *once), strict=True))
