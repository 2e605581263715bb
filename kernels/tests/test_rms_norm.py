"""RMSNorm against fp64: reference and kernel, forward and backward, with and without a residual, odd widths, strided rows."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from finery_kernels import rms_norm as op
from finery_kernels.errors import UnsupportedError
from finery_kernels.rms_norm import reference
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
    return Case(draw(1), draw(2) if residual else None, weight, draw(3), draw(4) if residual else None, offset)


def implementation(name):
    """The raw functions of one implementation and the device they run on; the kernel is interpreted where there is no GPU."""
    module = importlib.import_module(f"finery_kernels.rms_norm.{name}")
    return module, kernel_device() if name == "triton" else torch.device("cpu")


def eager(case, dtype):
    """Plain torch in `dtype`, every operation rounding: y, s, dx, dweight by autograd. In fp64 this is the oracle."""
    x, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (case.x, case.weight))
    s = x if case.residual is None else x + case.residual.to(dtype)
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS)
    y = s * rstd * (weight + case.offset)
    torch.autograd.backward([y] if case.dresidual is None else [y, s], [g.to(dtype) for g in (case.dy, case.dresidual) if g is not None])
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), s.detach(), x.grad, weight.grad


def run(module, case, *, dweight=None, **buffers):
    y, s, rstd = module.rms_norm_forward(
        case.x, case.weight, eps=EPS, offset=case.offset, residual_TD=case.residual, out=buffers.get("y"), residual_out=buffers.get("s")
    )
    dx = module.rms_norm_backward(
        case.dy, s, case.weight, rstd, offset=case.offset, dresidual_TD=case.dresidual, out=buffers.get("dx"), dweight_D=dweight
    )
    return y, s, rstd, dx


@pytest.mark.parametrize(("name", "dtype", "residual"), [*itertools.product(IMPLEMENTATIONS, DTYPES, [False, True])])
def test_forward_and_backward_err_no_more_than_eager_torch(name, dtype, residual):
    module, device = implementation(name)
    for seed, (num_rows, num_columns) in enumerate(SHAPES):
        case = make_case(num_rows, num_columns, dtype, seed=seed, residual=residual, offset=seed % 2, device=device)
        buffers = {key: poisoned(num_rows, num_columns, dtype=dtype, device=device) for key in ("y", "dx", *("s",) * residual)}
        dweight = torch.zeros(num_columns, device=device)
        y, s, _, dx = run(module, case, dweight=dweight, **buffers)
        assert y is buffers["y"]
        assert dx is buffers["dx"]
        assert s is (buffers["s"] if residual else case.x)
        got = {"y": y, "s": s, "dx": dx, "dweight": dweight}
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
    again = module.rms_norm_forward(s, case.weight, **options)[0]
    # Without the rounding a fifth differs; a sum in another order may flip one.
    assert (y != again).double().mean() < 0.01


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_outputs_may_overwrite_inputs(name):
    module, device = implementation(name)
    case = make_case(4, 40, torch.float32, device=device)
    want = run(module, case)
    y, s, rstd = module.rms_norm_forward(
        case.x, case.weight, eps=EPS, offset=0.0, residual_TD=case.residual, out=case.x, residual_out=case.residual
    )
    dx = module.rms_norm_backward(
        case.dy, s, case.weight, rstd, offset=0.0, dresidual_TD=case.dresidual, out=case.dresidual, dweight_D=None
    )
    for got, expected in zip((y, s, rstd, dx), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_weight_gradient_is_added_in_the_same_order_every_time(name):
    module, device = implementation(name)
    case = make_case(11, 72, torch.float32, device=device)
    start = random_normal(72, seed=5, device=device)
    totals = []
    for _ in range(2):
        dweight = start.clone()
        run(module, case, dweight=dweight)
        totals.append(dweight)
    assert torch.equal(totals[0], totals[1])
    oracle = start.double() + eager(case, torch.float64)[3]
    assert_within_budget(totals[0], oracle, start + eager(case, torch.float32)[3], factor=budget(torch.float32))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_weight_may_be_wider_than_the_activations(name):
    module, device = implementation(name)
    case = make_case(4, 64, torch.float16, device=device, weight_dtype=torch.float32)
    y, _, _, dx = run(module, case)
    oracle, plain = eager(case, torch.float64), eager(case, torch.float16)
    assert_within_budget(y, oracle[0], plain[0], factor=1.1, name="y")
    assert_within_budget(dx, oracle[2], plain[2], factor=1.1, name="dx")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_single_column_normalises_to_its_sign(name):
    module, device = implementation(name)
    case = make_case(5, 1, torch.float32, device=device)
    case.residual = 3 * case.x.sign()
    y, s, _, _ = run(module, case)
    torch.testing.assert_close(y, s.sign() * case.weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_rows_are_fine(name):
    module, device = implementation(name)
    case = make_case(0, 16, torch.float32, device=device)
    dweight = torch.ones(16, device=device)
    y, s, rstd, dx = run(module, case, dweight=dweight)
    assert [tuple(tensor.shape) for tensor in (y, s, rstd, dx)] == [(0, 16), (0, 16), (0,), (0, 16)]
    assert torch.equal(dweight, torch.ones(16, device=device))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_of_large_values_does_not_overflow(name):
    module, device = implementation(name)
    x = torch.full((2, 32), 60000.0, dtype=torch.float16, device=device)
    weight = torch.ones(32, dtype=torch.float16, device=device)
    y, _, _ = module.rms_norm_forward(x, weight, eps=EPS, offset=0.0, residual_TD=None, out=None, residual_out=None)
    torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-3, atol=0)


def test_kernel_and_reference_agree_row_by_row():
    module, device = implementation("triton")
    case = make_case(13, 33, torch.float32, device=device)
    for got, want in zip(run(module, case), run(reference, case), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_gradients_of_the_public_functions_are_those_of_fp64_torch():
    x, residual = (random_normal(2, 3, 7, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2))
    weight = random_normal(7, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: op.rms_norm(*args, eps=EPS, offset=1.0), (x, weight))
    assert torch.autograd.gradcheck(lambda *args: op.add_rms_norm(*args, eps=EPS), (x, residual, weight))
    torch.testing.assert_close(op.rms_norm(x, weight, eps=EPS), torch.nn.functional.rms_norm(x, (7,), weight, EPS))


def test_public_functions_take_layouts_without_rows():
    x = random_normal(4, 6, seed=1).t().requires_grad_()
    weight = torch.ones(4, requires_grad=True)
    op.rms_norm(x, weight, eps=EPS).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    y, _ = op.add_rms_norm(x, x, weight, eps=EPS)
    y.sum().backward()
    _, s = op.add_rms_norm(x, x, weight, eps=EPS)
    s.sum().backward()
    torch.testing.assert_close(op.rms_norm(torch.stack([x.detach()] * 2), weight, eps=EPS)[1], op.rms_norm(x, weight, eps=EPS))


def test_a_frozen_weight_costs_no_gradient():
    x = random_normal(3, 8, seed=1).requires_grad_()
    weight = torch.ones(8)
    op.rms_norm(x, weight, eps=EPS).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


def test_raw_functions_build_no_graph():
    x = random_normal(3, 8, seed=1).requires_grad_()
    y, _, rstd = op.rms_norm_forward(x, torch.ones(8, requires_grad=True), eps=EPS)
    assert not y.requires_grad
    assert not rstd.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TD": torch.zeros(2, 3, 8)}, r"x_TD: shape \(2, 3, 8\), wanted \[T, D\]"),
        ({"x_TD": torch.zeros(2, 8, dtype=torch.int32)}, "x_TD: torch.int32 on cpu, wanted one of torch.bfloat16"),
        ({"x_TD": torch.zeros(8, 2).t()}, r"x_TD: strides \(1, 2\), wanted unit stride"),
        ({"x_TD": torch.zeros(8).expand(2, 8)}, r"x_TD: strides \(0, 1\), wanted unit stride in the last dimension and at least 8"),
        ({"weight_D": torch.ones(7)}, r"weight_D: shape \(7,\), wanted \(8,\)"),
        ({"weight_D": torch.ones(16)[::2]}, r"weight_D: stride \(2,\), wanted a contiguous"),
        ({"weight_D": torch.ones(8, dtype=torch.int64)}, "weight_D: torch.int64"),
        ({"residual_TD": torch.zeros(2, 8, dtype=torch.bfloat16)}, "residual_TD: torch.bfloat16, wanted torch.float32"),
        ({"residual_TD": torch.zeros(3, 8)}, r"residual_TD: shape \(3, 8\), wanted \(2, 8\)"),
        ({"residual_TD": torch.zeros(2, 8, device="meta")}, "residual_TD: on meta, wanted cpu"),
        ({"residual_out": torch.zeros(2, 8)}, "residual_out: given without residual_TD"),
        ({"out": torch.zeros(2, 9)}, r"out: shape \(2, 9\)"),
    ],
)
def test_unsupported_forward_inputs_are_named(change, message):
    arguments = {"x_TD": torch.zeros(2, 8), "weight_D": torch.ones(8), **change}
    with pytest.raises(UnsupportedError, match=message):
        op.rms_norm_forward(arguments.pop("x_TD"), arguments.pop("weight_D"), eps=EPS, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rstd_T": torch.ones(3)}, r"rstd_T: shape \(3,\), wanted \(2,\)"),
        ({"rstd_T": torch.ones(2, dtype=torch.bfloat16)}, "rstd_T: torch.bfloat16, wanted torch.float32"),
        ({"dy_TD": torch.zeros(2, 8, dtype=torch.float16)}, "dy_TD: torch.float16, wanted torch.float32"),
        ({"dresidual_TD": torch.zeros(2, 7)}, r"dresidual_TD: shape \(2, 7\)"),
        ({"dweight_D": torch.zeros(8, dtype=torch.bfloat16)}, "dweight_D: torch.bfloat16, wanted torch.float32"),
        ({"out": torch.zeros(8, 2).t()}, r"out: strides \(1, 2\)"),
    ],
)
def test_unsupported_backward_inputs_are_named(change, message):
    arguments = {"dy_TD": torch.zeros(2, 8), "s_TD": torch.zeros(2, 8), "weight_D": torch.ones(8), "rstd_T": torch.ones(2), **change}
    positional = [arguments.pop(name) for name in ("dy_TD", "s_TD", "weight_D", "rstd_T")]
    with pytest.raises(UnsupportedError, match=message):
        op.rms_norm_backward(*positional, **arguments)


def test_public_functions_refuse_scalars_and_unlike_shapes():
    with pytest.raises(UnsupportedError, match="x: a scalar"):
        op.rms_norm(torch.tensor(1.0), torch.ones(1), eps=EPS)
    with pytest.raises(UnsupportedError, match=r"residual: shape \(1, 8\), wanted that of x, \(2, 8\)"):
        op.add_rms_norm(torch.zeros(2, 8), torch.zeros(1, 8), torch.ones(8), eps=EPS)


def test_norms_import_and_run_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from finery_kernels import layer_norm, rms_norm
x, ones = torch.randn(2, 8), torch.ones(8)
rms_norm.rms_norm(x, ones, eps=1e-5)
layer_norm.layer_norm(x, ones, ones, eps=1e-5)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def _orders(arch):
    kernels = importlib.import_module("finery_kernels.rms_norm.triton")
    forward_strides = dict.fromkeys(["x_stride", "residual_stride", "y_stride", "sum_stride"], "i32")
    backward_strides = dict.fromkeys(["dy_stride", "s_stride", "dresidual_stride", "dx_stride"], "i64")
    forward = dict.fromkeys(["x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "sum_ptr"], "*bf16") | {"rstd_ptr": "*fp32"}
    forward |= forward_strides | {"eps": "fp32", "offset": "fp32"}
    backward = dict.fromkeys(["dy_ptr", "s_ptr", "weight_ptr", "dresidual_ptr", "dx_ptr"], "*bf16") | {"rstd_ptr": "*fp32"}
    backward |= backward_strides | {"offset": "fp32"}
    dweight = backward | {"partial_ptr": "*fp32", "num_rows": "i32"}
    sums = {"partial_ptr": "*fp32", "dweight_ptr": "*fp32", "num_programs": "i32"}
    wide, odd = {"D": 4096, "BLOCK": 4096}, {"D": 576, "BLOCK": 1024}
    return [
        compilation(kernels.forward_kernel, forward, wide, arch, divisible=[*forward_strides], num_warps=8),
        compilation(kernels.forward_kernel, forward, odd | {"residual_ptr": None}, arch, num_warps=2),
        compilation(kernels.backward_kernel, backward, wide, arch, divisible=[*backward_strides], num_warps=8),
        compilation(kernels.backward_kernel, backward, odd | {"dresidual_ptr": None}, arch, num_warps=2),
        compilation(kernels.backward_dweight_kernel, dweight, wide | {"STAGES": 3}, arch, divisible=[*backward_strides], num_warps=8),
        compilation(kernels.backward_dweight_kernel, dweight, odd | {"STAGES": 4, "dresidual_ptr": None}, arch, num_warps=2),
        compilation(kernels.add_partial_sums_kernel, sums, {"D": 4096, "ROWS": 64, "COLUMNS": 32}, arch),
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
    x, residual, weight = (tensor.clone().requires_grad_() for tensor in (case.x, case.residual, case.weight))
    y, s = op.add_rms_norm(x, residual, weight, eps=EPS)
    torch.autograd.backward([y, s], [case.dy, case.dresidual])
    assert x.grad is not None
    assert weight.grad is not None
    assert residual.grad is not None
    got = (y.detach(), s.detach(), x.grad, weight.grad)
    for value, oracle, plain in zip(got, eager(case, torch.float64), eager(case, dtype), strict=True):
        assert_within_budget(value, oracle, plain, factor=budget(dtype))
    assert torch.equal(x.grad, residual.grad)


def test_the_norm_and_the_sum_are_not_written_to_one_place():
    x, ones, wide = torch.zeros(2, 8), torch.ones(8), torch.zeros(2, 12)
    for out, residual_out in ((x, x), (wide[:, :8], wide[:, 4:])):
        options = {"eps": EPS, "residual_TD": torch.zeros(2, 8), "out": out, "residual_out": residual_out}
        with pytest.raises(UnsupportedError, match="out overlaps residual_out; wanted memory of its own"):
            op.rms_norm_forward(x, ones, **options)


@pytest.mark.gpu
def test_a_gpu_repeats_itself_bit_by_bit():
    case = make_case(4099, 4096, torch.bfloat16, device="cuda")
    runs = []
    for _ in range(3):
        dweight = torch.zeros(4096, device="cuda")
        y, s, rstd = op.rms_norm_forward(case.x, case.weight, eps=EPS, residual_TD=case.residual)
        dx = op.rms_norm_backward(case.dy, s, case.weight, rstd, dresidual_TD=case.dresidual, dweight_D=dweight)
        runs.append((y, s, rstd, dx, dweight))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements_are_reached():
    num_rows, row_stride = 70_000, 32_768
    buffer = torch.zeros(num_rows, row_stride, dtype=torch.bfloat16, device="cuda")
    x = buffer[:, :512]
    x[-1] = 3.0
    y, _, rstd = op.rms_norm_forward(x, torch.ones(512, dtype=torch.bfloat16, device="cuda"), eps=EPS, out=buffer[:, 512:1024])
    torch.testing.assert_close(y[-1], torch.ones_like(y[-1]))
    dy = torch.ones_like(x)
    dx = op.rms_norm_backward(dy, x, torch.ones(512, dtype=torch.bfloat16, device="cuda"), rstd, out=buffer[:, 1024:1536])
    torch.testing.assert_close(dx[-1], torch.zeros_like(dx[-1]), rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_graph_replays_forward_and_backward():
    case = make_case(300, 1024, torch.bfloat16, device="cuda")
    dweight = torch.zeros(1024, device="cuda")

    def step():
        y, s, rstd = op.rms_norm_forward(case.x, case.weight, eps=EPS, residual_TD=case.residual)
        return y, op.rms_norm_backward(case.dy, s, case.weight, rstd, dresidual_TD=case.dresidual, dweight_D=dweight)

    want = [tensor.clone() for tensor in step()]
    once = dweight.clone()
    dweight.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(dweight, once)
