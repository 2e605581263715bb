"""Cross-entropy and its gradient against fp64: reference and kernel, softcap, scale, ignored and impossible targets, places for `out`."""

from __future__ import annotations

import importlib

import pytest
import torch

from finery_kernels.cross_entropy import cross_entropy, cross_entropy_forward_backward_
from finery_kernels.errors import UnsupportedError
from finery_kernels.testing import (
    ARCHITECTURES,
    assert_padding_untouched,
    assert_within_budget,
    compilation,
    compile_all,
    interpreting,
    kernel_device,
    poisoned,
    random_normal,
    strided,
)

IMPLEMENTATIONS = ["reference", "triton"]
# Less than a block; more than a step of the kernel, even and odd; several steps of eight warps.
VOCABULARIES = [5, 1000, 2305, 9000]
OPTIONS = [(None, 1.0), (None, 0.3), (7.0, 1.0), (5.0, 2.5)]
GRAD_SCALE = 0.37


def implementation(name):
    """The raw function of one implementation and its device; the kernel is interpreted where there is no GPU."""
    module = importlib.import_module(f"finery_kernels.cross_entropy.{name}")
    return module.cross_entropy_forward_backward_, kernel_device() if name == "triton" else torch.device("cpu")


def inputs(num_rows, num_classes, dtype, *, device="cpu", seed=0):
    """Logits, and targets of which every third is ignored and one is the last class."""
    logits = random_normal(num_rows, num_classes, seed=seed, dtype=dtype, device=device, scale=3.0, mean=1.0)
    targets = torch.randint(num_classes, (num_rows,), generator=torch.Generator().manual_seed(seed))
    targets[1::3] = -100
    targets[0] = num_classes - 1
    return logits, targets.to(device)


def eager(logits, targets, dtype, *, softcap, scale):
    """Plain torch in `dtype`: losses of the rows, gradient of GRAD_SCALE times their sum. In fp64 this is the oracle."""
    logits = logits.detach().to(dtype).requires_grad_()
    z = logits * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    losses = torch.nn.functional.cross_entropy(z, targets, reduction="none", ignore_index=-100)
    (gradient,) = torch.autograd.grad(losses.sum() * GRAD_SCALE, logits)
    return losses.detach(), gradient


def as_written(x, dtype, *, name):
    """`x` in `dtype` as the implementation writes it: the interpreter does not round to bf16, it truncates."""
    if name == "triton" and interpreting() and dtype == torch.bfloat16:
        return (x.view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return x.to(dtype)


def whole(view):
    """The buffer that `strided` made the view of."""
    assert view._base is not None
    return view._base


def call(function, logits, targets, *, softcap=None, scale=1.0, out, grad_scale=GRAD_SCALE):
    grad_scale = torch.tensor([grad_scale], device=logits.device)
    return function(logits, targets, softcap=softcap, scale=scale, grad_scale=grad_scale, out=out, ignore_index=-100)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("softcap", "scale"), OPTIONS)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_err_no_more_than_eager_torch(name, softcap, scale, logits_dtype):
    function, device = implementation(name)
    for seed, num_classes in enumerate(VOCABULARIES):
        logits, targets = inputs(5, num_classes, logits_dtype, device=device, seed=seed)
        losses, gradient = eager(logits, targets, torch.float64, softcap=softcap, scale=scale)
        plain_losses, plain_gradient = eager(logits, targets, torch.float32, softcap=softcap, scale=scale)
        for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = poisoned(5, num_classes, dtype=out_dtype, device=device)
            got = call(function, logits, targets, softcap=softcap, scale=scale, out=out)
            assert got.dtype == torch.float32
            assert_within_budget(got, losses, plain_losses, factor=3, name=f"loss of {num_classes}")
            rounded = as_written(plain_gradient, out_dtype, name=name)
            factor = 3 if out_dtype == torch.float32 else 1.05
            assert_within_budget(out, gradient, rounded, factor=factor, name=f"gradient of {num_classes}")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gradient_may_replace_the_logits_or_lie_in_their_upper_half(name):
    function, device = implementation(name)
    for num_classes, stride in ((96, 96), (2305, 2312), (9000, 9008)):
        logits, targets = inputs(4, num_classes, torch.float32, device=device)
        # How rows are aligned, read or written, decides the order of sums: bits are compared where they lie alike.
        beside = strided(logits, row_stride=stride)
        want = poisoned(4, num_classes, dtype=torch.float32, device=device, row_stride=stride)
        want_16 = poisoned(4, num_classes, dtype=torch.bfloat16, device=device, row_stride=2 * stride)
        losses = call(function, beside, targets, out=want)
        losses_16 = call(function, beside, targets, out=want_16)

        rows = strided(logits, row_stride=stride)
        assert torch.equal(call(function, rows, targets, out=rows), losses)
        assert torch.equal(rows, want)
        assert stride == num_classes or bool(torch.isnan(whole(rows)[:, num_classes:]).all())

        rows = strided(logits, row_stride=stride)
        upper = whole(rows).view(torch.bfloat16)[:, stride : stride + num_classes]
        assert torch.equal(call(function, rows, targets, out=upper), losses_16)
        assert torch.equal(upper, want_16)

        narrow = logits.to(torch.bfloat16)
        want_16 = poisoned(4, num_classes, dtype=torch.bfloat16, device=device)
        call(function, narrow.clone(), targets, out=want_16)
        call(function, narrow, targets, out=narrow)
        assert torch.equal(narrow, want_16)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_may_lie_apart_and_the_gaps_are_left_alone(name):
    function, device = implementation(name)
    logits, targets = inputs(4, 300, torch.float32, device=device)
    want = poisoned(4, 300, dtype=torch.float32, device=device)
    losses = call(function, logits, targets, out=want)
    out = poisoned(4, 300, dtype=torch.float32, device=device, row_stride=333)
    # No stride here is a multiple of 16, so sums are taken in one order.
    assert torch.equal(call(function, strided(logits, row_stride=312), targets, out=out), losses)
    assert torch.equal(out, want)
    assert_padding_untouched(out)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_ignored_rows_are_zero_and_impossible_targets_nan(name):
    function, device = implementation(name)
    logits, targets = inputs(6, 1000, torch.float32, device=device)
    logits[1] = float("nan")
    targets[:] = torch.tensor([3, -100, 1000, -1, 2**40, 999])
    out = poisoned(6, 1000, dtype=torch.float32, device=device)
    losses = call(function, logits, targets, out=out)
    assert torch.isnan(losses).tolist() == [False, False, True, True, True, False]
    assert losses[1] == 0.0
    assert torch.equal(out[1:5], torch.zeros_like(out[1:5]))
    assert bool((out[0] != 0).all())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_and_infinite_logits_are_exact(name):
    function, device = implementation(name)
    logits, targets = inputs(3, 2305, torch.float32, device=device)
    targets[1] = 7
    logits[0] += 1e4
    logits[1, 8:] = float("-inf")
    logits[2, :] = -1e4
    losses, gradient = eager(logits, targets, torch.float64, softcap=None, scale=1.0)
    plain_losses, plain_gradient = eager(logits, targets, torch.float32, softcap=None, scale=1.0)
    out = poisoned(3, 2305, dtype=torch.float32, device=device)
    assert_within_budget(call(function, logits, targets, out=out), losses, plain_losses, factor=3)
    assert_within_budget(out, gradient, plain_gradient, factor=3)
    assert bool((out[1, 8:] == 0).all())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_logit_that_is_no_number_makes_its_row_alone_nan(name):
    function, device = implementation(name)
    logits, targets = inputs(3, 1000, torch.float32, device=device)
    logits[2, 500] = float("nan")
    out = poisoned(3, 1000, dtype=torch.float32, device=device)
    losses = call(function, logits, targets, out=out)
    assert torch.isnan(losses).tolist() == [False, False, True]
    assert torch.isnan(out).any(dim=1).tolist() == [False, False, True]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_two_runs_are_bit_equal(name):
    function, device = implementation(name)
    logits, targets = inputs(3, 2305, torch.float32, device=device)
    first, second = (poisoned(3, 2305, dtype=torch.bfloat16, device=device) for _ in range(2))
    assert torch.equal(call(function, logits, targets, out=first), call(function, logits, targets, out=second))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("softcap", "scale"), OPTIONS)
def test_autograd_agrees_with_torch_in_fp64(reduction, softcap, scale):
    logits, targets = inputs(6, 37, torch.float64)
    logits.requires_grad_()
    z = logits * scale if softcap is None else softcap * torch.tanh(logits * scale / softcap)
    want = torch.nn.functional.cross_entropy(z, targets, reduction=reduction)
    got = cross_entropy(logits, targets, softcap=softcap, scale=scale, reduction=reduction)
    torch.testing.assert_close(got, want)
    upstream = torch.tensor(1.7, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, logits, upstream), torch.autograd.grad(want, logits, upstream))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, softcap=softcap, scale=scale, reduction=reduction), logits)


def test_a_scaled_mean_in_fp16_errs_no_more_than_eager_torch():
    logits, targets = random_normal(512, 2000, seed=1, dtype=torch.float16), torch.arange(512)
    results = []
    for dtype, function in ((torch.float64, None), (torch.float16, None), (torch.float16, cross_entropy)):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        loss = torch.nn.functional.cross_entropy(leaf.to(wide), targets) if function is None else function(leaf, targets)
        (loss * 2.0**14).backward()
        results.append(leaf.grad)
    oracle, plain, got = results
    assert_within_budget(got, oracle, plain, factor=1.5)


def test_autograd_leaves_the_logits_alone():
    logits, targets = inputs(3, 37, torch.float32)
    before = logits.clone()
    cross_entropy(logits.requires_grad_(), targets).backward()
    assert torch.equal(logits.detach(), before)


def test_a_mean_without_labels_is_refused_and_a_sum_is_zero():
    logits, targets = random_normal(3, 5, seed=0), torch.full((3,), -100)
    with pytest.raises(UnsupportedError, match="targets: none of 3 rows has a label, all are ignore_index -100; wanted at least one"):
        cross_entropy(logits, targets, reduction="mean")
    with pytest.raises(UnsupportedError, match="targets: none of 0 rows has a label"):
        cross_entropy(logits[:0], targets[:0])
    assert cross_entropy(logits, targets, reduction="sum") == 0
    assert cross_entropy(logits[:0], targets[:0], reduction="sum") == 0


def test_an_impossible_target_is_named_by_the_public_function():
    logits, targets = random_normal(3, 5, seed=0), torch.tensor([1, -100, 5])
    with pytest.raises(UnsupportedError, match="row 2 has target 5; wanted 0 to 4"):
        cross_entropy(logits, targets)
    assert cross_entropy(logits, torch.tensor([1, 7, 2]), ignore_index=7) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_TV": torch.zeros(4, 5, 6)}, "logits_TV has shape"),
        ({"logits_TV": torch.zeros(4, 5, dtype=torch.int32)}, "logits_TV is torch.int32"),
        ({"logits_TV": torch.zeros(5, 4).T}, "logits_TV has strides"),
        ({"logits_TV": torch.zeros(4, 0)}, "logits_TV has 0 columns; wanted 1 to 1073741824"),
        ({"logits_TV": torch.zeros(4, 1).expand(4, 2**30 + 1)}, "logits_TV has 1073741825 columns; wanted 1 to 1073741824"),
        ({"targets_T": torch.zeros(4, dtype=torch.int32)}, "targets_T is torch.int32"),
        ({"targets_T": torch.zeros(3, dtype=torch.int64)}, r"wanted contiguous int64 \(4,\)"),
        ({"grad_scale": torch.ones(2)}, "grad_scale is"),
        ({"grad_scale": torch.ones(1, dtype=torch.float64)}, "grad_scale is torch.float64"),
        ({"out": torch.zeros(4, 6)}, r"out has shape \(4, 6\); wanted \(4, 5\)"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"scale": float("inf")}, "scale is inf"),
    ],
)
def test_unsupported_inputs_are_named(change, message):
    arguments = {"logits_TV": torch.zeros(4, 5), "targets_T": torch.zeros(4, dtype=torch.int64), "grad_scale": torch.ones(1), **change}
    with pytest.raises(UnsupportedError, match=message):
        cross_entropy_forward_backward_(arguments.pop("logits_TV"), arguments.pop("targets_T"), **arguments)


def test_an_overlap_that_would_be_read_after_writing_is_refused():
    logits, targets, one = torch.zeros(4, 16), torch.zeros(4, dtype=torch.int64), torch.ones(1)
    lower = logits.view(torch.bfloat16)[:, :16]
    shifted = torch.zeros(5, 16)
    for logits_TV, out in ((logits, lower), (shifted[:4], shifted[1:])):
        with pytest.raises(UnsupportedError, match="out overlaps logits_TV"):
            cross_entropy_forward_backward_(logits_TV, targets, grad_scale=one, out=out)


def test_kernel_compiles_for_ampere_and_hopper():
    from finery_kernels.cross_entropy import triton

    orders = []
    for arch in ARCHITECTURES:
        for logits, out, num_classes in (("fp32", "bf16", 128256), ("bf16", "bf16", 262144), ("fp32", "fp32", 32001)):
            for softcap in (False, True):
                signature = {
                    "logits_ptr": f"*{logits}",
                    "targets_ptr": "*i64",
                    "grad_scale_ptr": "*fp32",
                    "loss_ptr": "*fp32",
                    "out_ptr": f"*{out}",
                }
                signature |= {"logits_stride": "i32", "out_stride": "i32", "scale": "fp32", "ignore_index": "i32"}
                block, unroll, num_warps = triton.geometry(num_classes, 4 if out == "fp32" else 2)
                constants = {"V": num_classes, "BLOCK": block, "UNROLL": unroll, "OVERLAP": out != logits}
                signature, constants = (
                    (signature | {"softcap": "fp32"}, constants) if softcap else (signature, constants | {"softcap": None})
                )
                orders.append(
                    compilation(
                        triton.cross_entropy_kernel,
                        signature,
                        constants,
                        arch,
                        divisible=("logits_stride", "out_stride"),
                        num_warps=num_warps,
                    )
                )
    for compiled in compile_all(orders):
        # A program of 32 warps has 64 registers a thread, and under a softcap wants some more.
        assert compiled.stack_bytes <= 16
        assert compiled.shared_bytes <= 1024, "maxima are taken within threads, not through shared memory"


@pytest.mark.gpu
@pytest.mark.parametrize("num_classes", [32001, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_vocabularies_on_a_gpu(num_classes, logits_dtype, softcap):
    assert not interpreting()
    logits, targets = inputs(70, num_classes, logits_dtype, device="cuda")
    losses, gradient = eager(logits, targets, torch.float64, softcap=softcap, scale=1.0)
    plain_losses, plain_gradient = eager(logits, targets, torch.float32, softcap=softcap, scale=1.0)
    out = poisoned(70, num_classes, dtype=torch.bfloat16, device="cuda")
    got = cross_entropy_forward_backward_(logits, targets, grad_scale=torch.full((1,), GRAD_SCALE, device="cuda"), softcap=softcap, out=out)
    assert_within_budget(got, losses, plain_losses, factor=3, name="loss")
    assert_within_budget(out, gradient, plain_gradient.to(torch.bfloat16), factor=1.01, name="gradient")
    if logits_dtype == torch.float32:
        # Bits are compared where rows lie alike, as above.
        row_stride = (num_classes + 15) // 16 * 16
        aligned = strided(logits, row_stride=row_stride)
        beside = poisoned(70, num_classes, dtype=torch.bfloat16, device="cuda", row_stride=2 * row_stride)
        want = call(cross_entropy_forward_backward_, aligned, targets, softcap=softcap, out=beside)
        for _ in range(5):
            rows = strided(logits, row_stride=row_stride)
            upper = whole(rows).view(torch.bfloat16)[:, rows.stride(0) : rows.stride(0) + num_classes]
            assert torch.equal(call(cross_entropy_forward_backward_, rows, targets, softcap=softcap, out=upper), want)
            assert torch.equal(upper, beside)


@pytest.mark.gpu
def test_kernel_runs_in_a_cuda_graph():
    logits, targets = inputs(64, 32000, torch.float32, device="cuda")
    other_logits, other_targets = inputs(64, 32000, torch.float32, device="cuda", seed=1)
    out, want = (poisoned(64, 32000, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    grad_scale = torch.full((1,), GRAD_SCALE, device="cuda")
    want_loss = cross_entropy_forward_backward_(other_logits, other_targets, grad_scale=grad_scale, out=want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cross_entropy_forward_backward_(logits, targets, grad_scale=grad_scale, out=out)
    logits.copy_(other_logits)
    targets.copy_(other_targets)
    graph.replay()
    assert torch.equal(loss, want_loss)
    assert torch.equal(out, want)
