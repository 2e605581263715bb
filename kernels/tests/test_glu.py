"""Gated linear units against fp64: reference and kernel, forward and backward, every activation, odd widths, strided and aliased rows."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys

import pytest
import torch

from finery_kernels import glu as op
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
SHAPES = [(1, 130), (3, 7), (5, 64), (2, 2100), (0, 8), (2, 1)]
IMPLEMENTATIONS = ["reference", "triton"]


def budget(dtype):
    """Factor on the eager error. fp32 has no wider dtype inside, and a GPU's exponential and quotient are good to 2 ulp, not to half."""
    return (3.0 if dtype == torch.float32 else 1.1) * truncation_factor(dtype)


def implementation(name):
    """The raw functions of one implementation and the device they run on; the kernel is interpreted where there is no GPU."""
    module = importlib.import_module(f"finery_kernels.glu.{name}")
    return module, kernel_device() if name == "triton" else torch.device("cpu")


def inputs(num_rows, width, dtype, *, seed=0, device="cpu", scale=2.0):
    """gate_up [T, 2F] and dact [T, F]."""
    gate_up = random_normal(num_rows, 2 * width, seed=10 * seed + 1, dtype=dtype, device=device, scale=scale)
    return gate_up, random_normal(num_rows, width, seed=10 * seed + 2, dtype=dtype, device=device)


def eager(gate_up, dact, activation, dtype):
    """act and dgate_up by plain torch in `dtype`, every operation rounding. In fp64 this is the oracle."""
    gate_up = gate_up.detach().to(dtype).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        act = torch.nn.functional.silu(gate) * up
    else:
        act = torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
    act.backward(dact.to(dtype))
    assert gate_up.grad is not None
    return act.detach(), gate_up.grad


def run(module, gate_up, dact, activation, *, act=None, dgate_up=None, again=None):
    """act and dgate_up, into poisoned buffers unless others are given."""
    act = poisoned(*dact.shape, dtype=dact.dtype, device=dact.device) if act is None else act
    dgate_up = poisoned(*gate_up.shape, dtype=dact.dtype, device=dact.device) if dgate_up is None else dgate_up
    assert module.glu_forward(gate_up, activation=activation, out=act) is act
    assert module.glu_backward(dact, gate_up, activation=activation, out=dgate_up, act_out=again) is dgate_up
    return act, dgate_up


@pytest.mark.parametrize(("name", "dtype", "activation"), [*itertools.product(IMPLEMENTATIONS, DTYPES, op.ACTIVATIONS)])
def test_forward_and_backward_err_no_more_than_eager_torch(name, dtype, activation):
    module, device = implementation(name)
    results = []
    for seed, (num_rows, width) in enumerate(SHAPES):
        gate_up, dact = inputs(num_rows, width, dtype, seed=seed, device=device)
        again = poisoned(num_rows, width, dtype=dtype, device=device)
        got = (*run(module, gate_up, dact, activation, again=again), again)
        oracle, plain = (eager(gate_up, dact, activation, wanted) for wanted in (torch.float64, dtype))
        results.append((got, (*oracle, oracle[0]), (*plain, plain[0])))
    for index, key in enumerate(("act", "dgate_up", "act again")):
        got, oracle, plain = (torch.cat([result[kind][index].flatten() for result in results]) for kind in range(3))
        assert_within_budget(got, oracle, plain, factor=budget(dtype), name=key)


@pytest.mark.parametrize(("name", "activation"), [*itertools.product(IMPLEMENTATIONS, op.ACTIVATIONS)])
def test_rows_may_lie_apart_and_the_gaps_are_left_alone(name, activation):
    module, device = implementation(name)
    gate_up, dact = inputs(6, 48, torch.float32, device=device)
    want = run(module, gate_up, dact, activation)
    act, again = (poisoned(6, 48, dtype=torch.float32, device=device, row_stride=stride) for stride in (50, 56))
    dgate_up = poisoned(6, 96, dtype=torch.float32, device=device, row_stride=104)
    apart = strided(gate_up, row_stride=97), strided(dact, row_stride=64)
    got = run(module, *apart, activation, act=act, dgate_up=dgate_up, again=again)
    assert all(torch.equal(a, b) for a, b in zip((*got, again), (*want, want[0]), strict=True))
    for buffer in (act, dgate_up, again):
        assert_padding_untouched(buffer)


@pytest.mark.parametrize(("name", "dtype"), [*itertools.product(IMPLEMENTATIONS, [torch.float32, torch.bfloat16])])
def test_the_backward_pass_may_overwrite_its_inputs(name, dtype):
    module, device = implementation(name)
    gate_up, dact = inputs(4, 70, dtype, device=device)
    act, dgate_up = run(module, gate_up, dact, "silu")
    module.glu_backward(dact, gate_up, activation="silu", out=gate_up, act_out=dact)
    assert torch.equal(gate_up, dgate_up)
    assert torch.equal(dact, act)


@pytest.mark.parametrize(("name", "activation"), [*itertools.product(IMPLEMENTATIONS, op.ACTIVATIONS)])
def test_gates_far_out_saturate_and_stay_finite(name, activation):
    module, device = implementation(name)
    gate = torch.tensor([[-3e4, -1e3, -90.0, 0.0, 90.0, 1e3, 3e4]], device=device)
    up = torch.full_like(gate, 2.0)
    act, dgate_up = run(module, torch.cat((gate, up), dim=1), torch.ones_like(gate), activation)
    torch.testing.assert_close(act, 2.0 * gate.clamp(min=0.0), rtol=1e-6, atol=1e-30)
    slope = torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]], device=device)
    torch.testing.assert_close(dgate_up, torch.cat((2.0 * slope, gate.clamp(min=0.0)), dim=1), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_gradients_of_the_public_function_are_those_of_fp64_torch(activation):
    gate_up = random_normal(2, 3, 10, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op.glu(x, activation=activation), (gate_up,))
    torch.testing.assert_close(op.glu(gate_up, activation=activation), eager(gate_up, torch.zeros(2, 3, 5), activation, torch.float64)[0])


def test_the_public_function_takes_layouts_without_rows():
    transposed = random_normal(10, 4, seed=1).t().requires_grad_()
    op.glu(transposed).sum().backward()
    assert transposed.grad is not None
    torch.testing.assert_close(op.glu(torch.stack([transposed.detach()] * 2))[1], op.glu(transposed.detach()))
    assert op.glu(torch.zeros(0, 3, 8)).shape == (0, 3, 4)
    assert op.glu(torch.ones(8)).shape == (4,)


def test_raw_functions_allocate_what_is_not_given_and_build_no_graph():
    gate_up, dact = inputs(3, 8, torch.bfloat16)
    gate_up.requires_grad_()
    act = op.glu_forward(gate_up, activation="silu")
    dgate_up = op.glu_backward(dact, gate_up, activation="silu")
    assert (act.shape, act.dtype, act.requires_grad) == ((3, 8), torch.bfloat16, False)
    assert (dgate_up.shape, dgate_up.dtype, dgate_up.requires_grad) == ((3, 16), torch.bfloat16, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up_TN": torch.zeros(2, 7)}, r"gate_up_TN has shape \(2, 7\); wanted \[T, 2F\]"),
        ({"gate_up_TN": torch.zeros(2, 3, 8)}, r"gate_up_TN has shape \(2, 3, 8\)"),
        ({"gate_up_TN": torch.zeros(2, 8, dtype=torch.int32)}, "gate_up_TN is torch.int32; wanted bfloat16"),
        ({"gate_up_TN": torch.zeros(8, 2).t()}, r"gate_up_TN has strides \(1, 2\); wanted a unit stride"),
        ({"gate_up_TN": torch.zeros(8).expand(2, 8)}, r"gate_up_TN has strides \(0, 1\); wanted .* at least 8 apart"),
        ({"activation": "relu"}, "activation is 'relu'; wanted one of silu, gelu, gelu_tanh"),
        ({"out": torch.zeros(2, 5)}, r"out has shape \(2, 5\); wanted \(2, 4\)"),
        ({"out": torch.zeros(2, 4, dtype=torch.float16)}, "out is torch.float16 on cpu; wanted torch.float32 on cpu"),
        ({"out": torch.zeros(2, 4, device="meta")}, "out is torch.float32 on meta"),
        ({"out": torch.zeros(4, 2).t()}, r"out has strides \(1, 2\)"),
    ],
)
def test_unsupported_forward_inputs_are_named(change, message):
    arguments = {"gate_up_TN": torch.zeros(2, 8), "activation": "silu", **change}
    with pytest.raises(UnsupportedError, match=message):
        op.glu_forward(arguments.pop("gate_up_TN"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dact_TF": torch.zeros(3, 4)}, r"dact_TF has shape \(3, 4\); wanted \(2, 4\)"),
        ({"dact_TF": torch.zeros(2, 4, dtype=torch.float16)}, "dact_TF is torch.float16"),
        ({"out": torch.zeros(2, 4)}, r"out has shape \(2, 4\); wanted \(2, 8\)"),
        ({"act_out": torch.zeros(2, 8)}, r"act_out has shape \(2, 8\); wanted \(2, 4\)"),
    ],
)
def test_unsupported_backward_inputs_are_named(change, message):
    arguments = {"dact_TF": torch.zeros(2, 4), "activation": "silu", **change}
    with pytest.raises(UnsupportedError, match=message):
        op.glu_backward(arguments.pop("dact_TF"), torch.zeros(2, 8), **arguments)


def test_outputs_lie_beside_what_is_read_and_not_over_it():
    buffer = random_normal(3, 24, seed=1)
    gate_up, beside = buffer[:, 4:12], buffer[:, 12:16]
    want = op.glu_forward(gate_up.clone(), activation="silu")
    assert torch.equal(op.glu_forward(gate_up, activation="silu", out=beside), want)
    for first in (1, 4, 8, 11):
        with pytest.raises(UnsupportedError, match="out overlaps gate_up_TN; wanted memory of its own"):
            op.glu_forward(gate_up, activation="silu", out=buffer[:, first : first + 4])
    with pytest.raises(UnsupportedError, match="out overlaps gate_up_TN"):
        op.glu_forward(gate_up, activation="silu", out=buffer.view(-1)[6:18].view(3, 4))
    want = op.glu_forward(buffer[:2, :8].clone(), activation="silu")
    assert torch.equal(op.glu_forward(buffer[:2, :8], activation="silu", out=buffer[2:].view(6, 4)[1:3]), want)
    with pytest.raises(UnsupportedError, match="act_out overlaps out"):
        op.glu_backward(torch.zeros(3, 4), gate_up, activation="silu", out=gate_up, act_out=gate_up[:, 4:])


def test_outputs_of_the_backward_pass_replace_their_inputs_whole_or_lie_apart():
    buffer = random_normal(3, 32, seed=1)
    gate_up, dact = buffer[:, 4:12], buffer[:, 12:16]
    options = {"activation": "silu", "out": buffer[:, 16:24], "act_out": buffer[:, 24:28]}
    want, want_act = op.glu_backward(dact, gate_up, activation="silu"), op.glu_forward(gate_up, activation="silu")
    assert torch.equal(op.glu_backward(dact, gate_up, **options), want)
    assert torch.equal(options["act_out"], want_act)
    for change, message in [
        ({"out": buffer[:, 3:11]}, "out overlaps gate_up_TN; wanted gate_up_TN itself or memory of its own"),
        ({"out": buffer[:, 15:23]}, "out overlaps dact_TF; wanted memory of its own"),
        ({"out": buffer[:, 12:20]}, "out overlaps dact_TF"),
        ({"act_out": buffer[:, 13:17], "out": None}, "act_out overlaps dact_TF; wanted dact_TF itself or memory of its own"),
        ({"act_out": buffer[:, 8:12]}, "act_out overlaps gate_up_TN; wanted memory of its own"),
    ]:
        with pytest.raises(UnsupportedError, match=message):
            op.glu_backward(dact, gate_up, **{**options, **change})
    with pytest.raises(UnsupportedError, match="out overlaps gate_up_TN"):
        op.glu_backward(dact.clone(), gate_up, activation="silu", out=buffer.view(-1)[4:52].view(3, 16)[:, :8])
    op.glu_backward(dact, gate_up, activation="silu", out=gate_up, act_out=dact)
    assert torch.equal(gate_up, want)
    assert torch.equal(dact, want_act)
    row = random_normal(1, 8, seed=2)
    assert op.glu_backward(random_normal(1, 4, seed=3), row, activation="silu", out=row.as_strided((1, 8), (9, 1))).shape == (1, 8)


def test_the_public_function_refuses_scalars():
    with pytest.raises(UnsupportedError, match="gate_up is a scalar"):
        op.glu(torch.tensor(1.0))


def test_a_machine_without_triton_imports_the_operation():
    code = "import sys; sys.modules['triton'] = None; import torch; from finery_kernels.glu import glu; glu(torch.ones(2, 4))"
    subprocess.run([sys.executable, "-c", code], check=True)


def _orders(arch):
    kernels = importlib.import_module("finery_kernels.glu.triton")
    forward = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "gate_up_stride": "i32", "out_stride": "i32"}
    backward = dict.fromkeys(["dact_ptr", "gate_up_ptr", "out_ptr", "act_ptr"], "*bf16")
    backward |= dict.fromkeys(["dact_stride", "gate_up_stride", "out_stride", "act_stride"], "i64")
    wide, odd = {"F": 14336, "ALIGN": 8, "BLOCK": 2048}, {"F": 130, "ALIGN": 1, "BLOCK": 256}
    orders = [compilation(kernels.forward_kernel, forward, wide | {"ACTIVATION": name}, arch) for name in op.ACTIVATIONS]
    orders += [compilation(kernels.backward_kernel, backward, wide | {"ACTIVATION": name}, arch) for name in op.ACTIVATIONS]
    orders.append(compilation(kernels.forward_kernel, forward, odd | {"ACTIVATION": "silu"}, arch, num_warps=1))
    orders.append(compilation(kernels.backward_kernel, backward, odd | {"ACTIVATION": "silu", "act_ptr": None}, arch, num_warps=1))
    return orders


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_and_move_16_bytes_at_a_time_where_rows_lie_8_elements_apart(arch):
    compiled = compile_all(_orders(arch))
    for kernel in compiled[:6]:
        accesses = [line.split()[0] for line in kernel.ptx.replace("@", "\n").splitlines() if ".global" in line and "v4.b32" not in line]
        assert not [access for access in accesses if access.startswith(("ld.global", "st.global"))]
    assert [kernel.stack_bytes for kernel in compiled] == [0] * len(compiled), "nothing is spilled"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "activation"), [*itertools.product(DTYPES, op.ACTIVATIONS)])
@pytest.mark.parametrize(("num_rows", "width"), [(2048, 14336), (515, 1440), (33, 11008), (3, 53248), (257, 33)])
def test_public_functions_keep_the_budget_on_a_gpu(dtype, activation, num_rows, width):
    gate_up, dact = inputs(num_rows, width, dtype, device="cuda")
    leaf = gate_up.clone().requires_grad_()
    act = op.glu(leaf, activation=activation)
    act.backward(dact)
    assert leaf.grad is not None
    oracle, plain = eager(gate_up, dact, activation, torch.float64), eager(gate_up, dact, activation, dtype)
    assert_within_budget(act.detach(), oracle[0], plain[0], factor=budget(dtype), name="act")
    assert_within_budget(leaf.grad, oracle[1], plain[1], factor=budget(dtype), name="dgate_up")


@pytest.mark.gpu
def test_a_gpu_repeats_itself_in_place_and_apart():
    gate_up, dact = inputs(4099, 1536, torch.bfloat16, device="cuda")
    wide = strided(gate_up, row_stride=2 * 1536 + 96), strided(dact, row_stride=1536 + 32)
    want = op.glu_forward(gate_up, activation="silu"), op.glu_backward(dact, gate_up, activation="silu")
    assert torch.equal(op.glu_forward(wide[0], activation="silu"), want[0])
    assert op.glu_backward(wide[1], wide[0], activation="silu", out=wide[0], act_out=wide[1]) is wide[0]
    assert torch.equal(wide[0], want[1])
    assert torch.equal(wide[1], want[0])
    for buffer in wide:
        assert_padding_untouched(buffer)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements_are_reached():
    num_rows, row_stride = 70_000, 32_768
    gate_up = torch.zeros(num_rows, row_stride, dtype=torch.bfloat16, device="cuda")[:, :1024]
    gate_up[-1] = 3.0
    act = op.glu_forward(gate_up, activation="gelu")
    dgate_up = op.glu_backward(torch.ones_like(act), gate_up, activation="gelu", out=gate_up)
    torch.testing.assert_close(act[-1].float(), torch.full((512,), 8.988, device="cuda"), rtol=1e-2, atol=0)
    torch.testing.assert_close(dgate_up[-1, 512:].float(), torch.full((512,), 2.996, device="cuda"), rtol=1e-2, atol=0)
    assert not act[:-1].any()


@pytest.mark.gpu
def test_a_captured_graph_replays_forward_and_backward():
    gate_up, dact = inputs(300, 1024, torch.bfloat16, device="cuda")

    def step():
        return op.glu_forward(gate_up, activation="silu"), op.glu_backward(dact, gate_up, activation="silu")

    want = [tensor.clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
