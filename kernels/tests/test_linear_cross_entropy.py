"""Cross-entropy through the head's weight against fp64: tiles, chosen rows and pads, the weight's gradient, strided buffers, autograd."""

from __future__ import annotations

import importlib

import pytest
import torch

from finery_kernels.errors import UnsupportedError
from finery_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_forward_backward
from finery_kernels.linear_cross_entropy.api import default_tile_rows
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
)

IMPLEMENTATIONS = ["reference", "triton"]
OPTIONS = [(None, 1.0), (None, 0.3), (7.0, 1.0), (5.0, 2.5)]
GRAD_SCALE = 0.37


def implementation(name):
    """The raw function of one implementation and its device; the kernels are interpreted where there is no GPU."""
    module = importlib.import_module(f"finery_kernels.linear_cross_entropy.{name}")
    return module.linear_cross_entropy_forward_backward, kernel_device() if name == "triton" else torch.device("cpu")


def inputs(num_rows, hidden, num_classes, dtype, *, device="cpu", seed=0):
    h = random_normal(num_rows, hidden, seed=2 * seed, dtype=dtype, device=device)
    weight = random_normal(num_classes, hidden, seed=2 * seed + 1, dtype=dtype, device=device, scale=2.0 * hidden**-0.5)
    targets = torch.randint(num_classes, (num_rows,), generator=torch.Generator().manual_seed(seed))
    targets[1::3] = -100
    return h, weight, targets.to(device)


def eager(h, weight, targets, dtype, *, softcap=None, scale=1.0, grad_scale=GRAD_SCALE):
    """Plain torch in `dtype`, the loss in fp32 as transformers has it: summed loss, dh, dweight. In fp64 this is the oracle."""
    h, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (h, weight))
    z = (h @ weight.T) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = torch.nn.functional.cross_entropy(z.to(torch.promote_types(dtype, torch.float32)), targets, reduction="sum", ignore_index=-100)
    return loss.detach(), *torch.autograd.grad(loss * grad_scale, (h, weight))


def call(function, h, weight, targets, *, out, dweight=None, rows=None, tile_rows=4, softcap=None, scale=1.0):
    return function(
        h,
        weight,
        targets,
        rows_L=rows,
        softcap=softcap,
        scale=scale,
        grad_scale=torch.tensor([GRAD_SCALE], device=h.device),
        tile_rows=tile_rows,
        out_dh=out,
        dweight_VD=dweight,
        ignore_index=-100,
    )


def assert_all_within_budget(got, case, *, factor, **options):
    wanted, plain = eager(*case, torch.float64, **options), eager(*case, case[0].dtype, **options)
    for name, value, oracle, low in zip(("loss", "dh", "dweight"), got, wanted, plain, strict=True):
        assert_within_budget(value, oracle, low, factor=factor, name=name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("softcap", "scale"), OPTIONS)
def test_loss_and_gradients_err_no_more_than_eager_torch(name, softcap, scale):
    function, device = implementation(name)
    for seed, (num_rows, hidden, num_classes) in enumerate([(1, 8, 5), (11, 24, 67), (8, 16, 1000)]):
        case = inputs(num_rows, hidden, num_classes, torch.float32, device=device, seed=seed)
        out, dweight = poisoned(num_rows, hidden, dtype=torch.float32, device=device), torch.zeros(num_classes, hidden, device=device)
        loss = call(function, *case, out=out, dweight=dweight, softcap=softcap, scale=scale)
        assert_all_within_budget((loss, out, dweight), case, factor=3, softcap=softcap, scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_in_16_bits_errs_no_more_than_eager_torch(dtype):
    function, _ = implementation("reference")
    case = inputs(22, 48, 300, dtype)
    for dweight_dtype in (torch.float32, dtype):
        out, dweight = poisoned(22, 48, dtype=dtype), torch.zeros(300, 48, dtype=dweight_dtype)
        loss = call(function, *case, out=out, dweight=dweight, tile_rows=32)
        assert_all_within_budget((loss, out, dweight), case, factor=1.0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_only_the_chosen_rows_go_through_the_head(name):
    function, device = implementation(name)
    h, weight, targets = inputs(11, 24, 67, torch.float32, device=device)
    targets[0], targets[10] = 5, 6
    want, want_dweight = poisoned(11, 24, dtype=torch.float32, device=device), torch.zeros(67, 24, device=device)
    loss = call(function, h, weight, targets, out=want, dweight=want_dweight, tile_rows=11)
    labelled = (targets != -100).nonzero().squeeze(1).flip(0)
    rows = torch.cat((labelled, torch.zeros(5, dtype=torch.int64, device=device)))
    row_targets = torch.cat((targets[labelled], torch.full((5,), -100, device=device)))
    for tile_rows in (2, 5, 64):
        out, dweight = poisoned(11, 24, dtype=torch.float32, device=device, row_stride=29), torch.zeros(67, 24, device=device)
        got = call(function, h, weight, row_targets, rows=rows, out=out, dweight=dweight, tile_rows=tile_rows)
        for value, expected in ((got, loss), (out, want), (dweight, want_dweight)):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert bool((out[0] != 0).any()), "the pads' zeros must not overwrite the row they repeat"
        assert torch.equal(out[targets == -100], torch.zeros_like(out[targets == -100]))
        assert_padding_untouched(out)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_may_lie_apart_and_the_weights_gradient_is_added(name):
    function, device = implementation(name)
    h, weight, targets = inputs(7, 24, 67, torch.float32, device=device)
    want, want_dweight = poisoned(7, 24, dtype=torch.float32, device=device), torch.zeros(67, 24, device=device)
    loss = call(function, h, weight, targets, out=want, dweight=want_dweight)
    out, dweight = poisoned(7, 24, dtype=torch.float32, device=device, row_stride=32), torch.ones(67, 24, device=device)
    got = call(function, strided(h, row_stride=40), strided(weight, row_stride=28), targets, out=out, dweight=dweight)
    for value, expected in ((got, loss), (out, want), (dweight, want_dweight + 1)):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert_padding_untouched(out)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_without_labels_have_no_gradient_and_impossible_targets_no_loss(name):
    function, device = implementation(name)
    h, weight, targets = inputs(5, 8, 67, torch.float32, device=device)
    out = poisoned(5, 8, dtype=torch.float32, device=device)
    assert call(function, h, weight, torch.full_like(targets, -100), out=out) == 0
    assert torch.equal(out, torch.zeros_like(out))
    targets[2] = 67
    assert torch.isnan(call(function, h, weight, targets, out=out))
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    assert call(function, h[:0], weight, targets[:0], out=out[:0]) == 0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_two_runs_are_bit_equal(name):
    function, device = implementation(name)
    case = inputs(9, 24, 67, torch.float32, device=device)
    results = []
    for _ in range(2):
        out, dweight = poisoned(9, 24, dtype=torch.float32, device=device), torch.zeros(67, 24, device=device)
        results.append((call(function, *case, out=out, dweight=dweight), out, dweight))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("softcap", "scale"), OPTIONS)
def test_autograd_agrees_with_torch_in_fp64(reduction, softcap, scale):
    h, weight, targets = inputs(7, 6, 11, torch.float64)
    h, weight = h.requires_grad_(), weight.requires_grad_()

    def ours(h, weight):
        return linear_cross_entropy(h, weight, targets, softcap=softcap, scale=scale, reduction=reduction, tile_rows=3)

    z = (h @ weight.T) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    want, got = torch.nn.functional.cross_entropy(z, targets, reduction=reduction), ours(h, weight)
    torch.testing.assert_close(got, want)
    upstream = torch.tensor(1.7, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, (h, weight), upstream), torch.autograd.grad(want, (h, weight), upstream))
    assert torch.autograd.gradcheck(ours, (h, weight))


def test_a_scaled_mean_in_fp16_errs_no_more_than_eager_torch():
    h, weight, _ = inputs(512, 32, 2000, torch.float16)
    targets = torch.arange(512)
    results = []
    for dtype in (torch.float64, torch.float16):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (h, weight)]
        logits = (leaves[0] @ leaves[1].T).to(torch.promote_types(dtype, torch.float32))
        (torch.nn.functional.cross_entropy(logits, targets) * 2.0**14).backward()
        results.append([leaf.grad for leaf in leaves])
    leaves = [tensor.requires_grad_() for tensor in (h, weight)]
    (linear_cross_entropy(*leaves, targets) * 2.0**14).backward()
    for name, leaf, oracle, plain in zip(("dh", "dweight"), leaves, *results, strict=True):
        assert_within_budget(leaf.grad, oracle, plain, factor=1.2, name=name)


def test_the_raw_function_records_no_graph():
    h, weight, targets = inputs(7, 8, 11, torch.float32)
    loss, dh = linear_cross_entropy_forward_backward(h.requires_grad_(), weight.requires_grad_(), targets, grad_scale=torch.ones(1))
    assert not loss.requires_grad
    assert not dh.requires_grad


def test_a_frozen_weight_gets_no_gradient():
    h, weight, targets = inputs(7, 8, 11, torch.float32)
    linear_cross_entropy(h.requires_grad_(), weight, targets).backward()
    assert h.grad is not None
    assert weight.grad is None


def test_a_mean_without_labels_is_refused_and_a_sum_is_zero():
    h, weight, targets = inputs(7, 8, 11, torch.float32)
    nothing = torch.full_like(targets, -100)
    with pytest.raises(UnsupportedError, match="targets: none of 7 rows has a label"):
        linear_cross_entropy(h, weight, nothing)
    assert linear_cross_entropy(h, weight, nothing, reduction="sum") == 0


def test_default_tiles_hold_half_a_gib_of_logits():
    assert default_tile_rows(128256) == 1024
    assert default_tile_rows(262144) == 512
    assert default_tile_rows(10**8) == 128
    assert default_tile_rows(5) == 8192


def test_an_impossible_target_is_named_by_the_public_function():
    h, weight, targets = inputs(3, 8, 11, torch.float32)
    targets[2] = 11
    with pytest.raises(UnsupportedError, match="row 2 has target 11; wanted 0 to 10"):
        linear_cross_entropy(h, weight, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h_TD": torch.zeros(4)}, "h_TD has shape"),
        ({"h_TD": torch.zeros(4, 8, dtype=torch.int32)}, "h_TD is torch.int32"),
        ({"h_TD": torch.zeros(8, 4).T}, "h_TD has strides"),
        ({"weight_VD": torch.zeros(5, 8, dtype=torch.bfloat16)}, "weight_VD is torch.bfloat16; wanted torch.float32"),
        ({"weight_VD": torch.zeros(5, 9)}, r"weight_VD has shape \(5, 9\); wanted \(5, 8\)"),
        ({"targets_T": torch.zeros(3, dtype=torch.int64)}, r"targets_T is torch.int64 \(3,\); wanted int64 \(4,\)"),
        ({"rows_L": torch.zeros(3, dtype=torch.int64)}, r"targets_T is torch.int64 \(4,\); wanted int64 \(3,\)"),
        ({"targets_T": torch.zeros(8, dtype=torch.int64)[::2]}, "targets_T has stride 2; wanted 1"),
        ({"rows_L": torch.zeros(4, dtype=torch.int32)}, "rows_L is torch.int32"),
        ({"out_dh": torch.zeros(4, 7)}, "out_dh has shape"),
        ({"dweight_VD": torch.zeros(5, 8, dtype=torch.float16)}, "dweight_VD is torch.float16"),
        ({"grad_scale": torch.ones(2)}, "grad_scale is"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"tile_rows": 0}, "tile_rows is 0"),
    ],
)
def test_unsupported_inputs_are_named(change, message):
    arguments = {"h_TD": torch.zeros(4, 8), "weight_VD": torch.zeros(5, 8), "targets_T": torch.zeros(4, dtype=torch.int64), **change}
    positional = [arguments.pop(name) for name in ("h_TD", "weight_VD", "targets_T")]
    with pytest.raises(UnsupportedError, match=message):
        linear_cross_entropy_forward_backward(*positional, **{"grad_scale": torch.ones(1), **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_T": torch.arange(3)}, r"targets_T is torch.int64 \(3,\); wanted int64 \(4,\)"),
        ({"targets_T": torch.arange(5)}, r"targets_T is torch.int64 \(5,\); wanted int64 \(4,\)"),
        ({"targets_T": torch.zeros(2, 2, dtype=torch.int64)}, r"targets_T is torch.int64 \(2, 2\)"),
        ({"targets_T": torch.tensor(9)}, r"targets_T is torch.int64 \(\)"),
        ({"targets_T": torch.full((4,), 9, dtype=torch.int32)}, r"targets_T is torch.int32 \(4,\); wanted int64 \(4,\)"),
        ({"targets_T": torch.zeros(4, dtype=torch.int64, device="meta")}, "targets_T is on meta; wanted cpu, where h_TD is"),
        ({"h_TD": torch.tensor(1.0)}, r"h_TD has shape \(\); wanted two dimensions"),
        ({"weight_VD": torch.zeros(5)}, r"weight_VD has shape \(5,\); wanted two dimensions"),
    ],
)
def test_targets_that_do_not_go_with_the_rows_are_named_by_the_public_function(change, message):
    arguments = {"h_TD": torch.zeros(4, 8), "weight_VD": torch.zeros(5, 8), "targets_T": torch.zeros(4, dtype=torch.int64), **change}
    with pytest.raises(UnsupportedError, match=message):
        linear_cross_entropy(*arguments.values())


def test_the_public_function_takes_targets_with_gaps():
    h, weight, targets = inputs(7, 8, 11, torch.float32)
    apart = torch.stack((targets, targets), dim=1)[:, 0]
    assert torch.equal(linear_cross_entropy(h, weight, apart), linear_cross_entropy(h, weight, targets))


def test_kernel_compiles_for_ampere_and_hopper():
    from finery_kernels.linear_cross_entropy import triton

    signature = {"x_ptr": "*bf16", "rows_ptr": "*i64", "targets_ptr": "*i64", "out_ptr": "*bf16"}
    signature |= {"x_stride": "i32", "out_stride": "i32", "ignore_index": "i32"}
    constants = {"D": 4096, "BLOCK": 2048}
    orders = [
        compilation(triton.put_rows_kernel, signature, constants, arch, divisible=("x_stride", "out_stride")) for arch in ARCHITECTURES
    ]
    assert [compiled.stack_bytes for compiled in compile_all(orders)] == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("hidden", "num_classes"), [(256, 32000), (192, 32003)])
def test_16_bit_heads_on_a_gpu(dtype, softcap, hidden, num_classes):
    case = inputs(300, hidden, num_classes, dtype, device="cuda")
    h, weight, targets = case
    grad_scale = torch.full((1,), GRAD_SCALE, device="cuda")
    out = poisoned(300, hidden, dtype=dtype, device="cuda", row_stride=hidden + 64)
    dweight = torch.zeros(num_classes, hidden, device="cuda")
    options = {"grad_scale": grad_scale, "softcap": softcap, "out_dh": out, "dweight_VD": dweight}
    loss, dh = linear_cross_entropy_forward_backward(h, weight, targets, tile_rows=128, **options)
    factor = 3.0 if dtype == torch.float32 else 1.05
    assert_all_within_budget((loss, dh, dweight), case, factor=factor, softcap=softcap)
    assert_padding_untouched(out)

    rows = torch.cat(((targets != -100).nonzero().squeeze(1), torch.zeros(57, dtype=torch.int64, device="cuda")))
    row_targets = targets[rows].clone()
    row_targets[-57:] = -100
    dweight.zero_()
    out.fill_(float("nan"))
    loss, dh = linear_cross_entropy_forward_backward(h, weight, row_targets, rows_L=rows, tile_rows=100, **options)
    assert_all_within_budget((loss, dh, dweight), case, factor=factor, softcap=softcap)

    narrow = torch.zeros(num_classes, hidden, dtype=dtype, device="cuda")
    options["dweight_VD"] = narrow
    loss, dh = linear_cross_entropy_forward_backward(h, weight, targets, tile_rows=300, **options)
    assert_all_within_budget((loss, dh, narrow), case, factor=factor, softcap=softcap)


@pytest.mark.gpu
def test_autograd_on_a_gpu():
    case = inputs(300, 256, 32000, torch.bfloat16, device="cuda")
    h, weight, targets = case
    h, weight = h.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(h, weight, targets, reduction="sum", tile_rows=128)
    (loss * GRAD_SCALE).backward()
    assert_all_within_budget((loss.detach(), h.grad, weight.grad), case, factor=1.2)


@pytest.mark.gpu
def test_a_gpu_repeats_itself_bit_by_bit():
    h, weight, targets = inputs(1000, 512, 32003, torch.bfloat16, device="cuda")
    rows = (targets != -100).nonzero().squeeze(1)
    runs = []
    for _ in range(3):
        dweight = torch.zeros(32003, 512, device="cuda")
        options = {"grad_scale": torch.ones(1, device="cuda"), "rows_L": rows, "tile_rows": 300, "dweight_VD": dweight}
        runs.append((*linear_cross_entropy_forward_backward(h, weight, targets[rows], **options), dweight))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_raw_function_runs_in_a_cuda_graph():
    h, weight, targets = inputs(256, 256, 32000, torch.bfloat16, device="cuda")
    other_h, _, other_targets = inputs(256, 256, 32000, torch.bfloat16, device="cuda", seed=1)
    grad_scale = torch.full((1,), GRAD_SCALE, device="cuda")
    rows = torch.arange(255, -1, -1, device="cuda")
    options = {"grad_scale": grad_scale, "tile_rows": 100, "rows_L": rows}
    want_loss, want = linear_cross_entropy_forward_backward(other_h, weight, other_targets, **options)
    out = poisoned(256, 256, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = linear_cross_entropy_forward_backward(h, weight, targets, out_dh=out, **options)
    h.copy_(other_h)
    targets.copy_(other_targets)
    graph.replay()
    assert torch.equal(loss, want_loss)
    assert torch.equal(out, want)
