"""Rows, and heads, that lie past 2^31 elements: every kernel reads and writes what it does where they lie side by side.

Runs in the interpreter, whose integers have the kernel's widths and wrap around as a GPU's do, and on a GPU, where every tensor so placed
takes 4 GiB. AdamW's flat buffer is as long as it is far: a GPU's test of its own has it.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from finery_kernels.testing import far_apart, interpreting, kernel_device, poisoned, random_normal

NUM_ROWS = 3
EPS = 1e-5
PLACEMENTS = [torch.clone, far_apart]


@pytest.fixture(autouse=True, params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def _where(request):
    if (request.param == "interpreter") != interpreting():
        pytest.skip(f"needs the {request.param}")


def kernels(name):
    return importlib.import_module(f"finery_kernels.{name}.triton")


def draw(*shape, seed, dtype=torch.float16):
    return random_normal(*shape, seed=seed, dtype=dtype, device=kernel_device())


def unwritten(*shape, dtype=torch.float16):
    return poisoned(*shape, dtype=dtype, device=kernel_device())


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=kernel_device())


def indices(*values):
    return torch.tensor(values, device=kernel_device())


def assert_placement_changes_nothing(run):
    """`run` takes what puts a tensor in its place, and returns tensors."""
    near, far = (run(place) for place in PLACEMENTS)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
    assert all(bool(torch.isfinite(x).all()) for x in near)


def test_rms_norm():
    module, weight = kernels("rms_norm"), draw(24, seed=4)

    def run(place):
        x, residual, dy = (place(draw(NUM_ROWS, 24, seed=seed)) for seed in (1, 2, 3))
        y, s = (place(unwritten(NUM_ROWS, 24)) for _ in range(2))
        _, _, rstd = module.rms_norm_forward(x, weight, eps=EPS, offset=0.0, residual_TD=residual, out=y, residual_out=s)
        results = [y, s, rstd]
        for dweight in (None, zeros(24)):
            dx = place(unwritten(NUM_ROWS, 24))
            module.rms_norm_backward(dy, s, weight, rstd, offset=0.0, dresidual_TD=residual, out=dx, dweight_D=dweight)
            results += [dx] if dweight is None else [dx, dweight]
        return results

    assert_placement_changes_nothing(run)


def test_layer_norm():
    module, weight, bias = kernels("layer_norm"), draw(24, seed=4), draw(24, seed=5)

    def run(place):
        x, residual, dy = (place(draw(NUM_ROWS, 24, seed=seed)) for seed in (1, 2, 3))
        y, s = (place(unwritten(NUM_ROWS, 24)) for _ in range(2))
        options = {"eps": EPS, "residual_TD": residual, "out": y, "residual_out": s}
        _, _, mean, rstd = module.layer_norm_forward(x, weight, bias, offset=0.0, **options)
        results = [y, s, mean, rstd]
        for sums in ((None, None), (zeros(24), zeros(24))):
            dx, saved = place(unwritten(NUM_ROWS, 24)), (s, weight, mean, rstd)
            gradients = {"dresidual_TD": residual, "dweight_D": sums[0], "dbias_D": sums[1]}
            module.layer_norm_backward(dy, *saved, offset=0.0, out=dx, **gradients)
            results += [dx, *(total for total in sums if total is not None)]
        return results

    assert_placement_changes_nothing(run)


def test_glu():
    module = kernels("glu")

    def run(place):
        gate_up, dact = place(draw(NUM_ROWS, 80, seed=1)), place(draw(NUM_ROWS, 40, seed=2))
        out, act = (place(unwritten(NUM_ROWS, 40)) for _ in range(2))
        module.glu_forward(gate_up, activation="silu", out=out)
        module.glu_backward(dact, gate_up, activation="silu", out=gate_up, act_out=act)
        return out, gate_up, act

    assert_placement_changes_nothing(run)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rotary_dim", [16, 12, 0])
def test_rope(dim, rotary_dim):
    """Along `dim` 0 tokens lie apart; along 1 heads do, as they do where [H, T, d] was transposed."""
    module, shape = kernels("rope"), (NUM_ROWS, NUM_ROWS, 16)
    weights = draw(16, seed=8), draw(16, seed=9)
    cos, sin = (draw(5, rotary_dim, seed=seed, dtype=torch.float32) for seed in (10, 11))
    table = (cos, sin, indices(4, 0, 2)) if rotary_dim else None

    def run(place):
        def placed(x):
            return far_apart(x, dim=dim) if place is far_apart else x

        q, k, v = (placed(draw(*shape, seed=seed)) for seed in (1, 2, 3))
        turned, normed, pre, dx = (tuple(placed(unwritten(*shape)) for _ in range(number)) for number in (3, 2, 2, 3))
        module.rotate((q, k, v), turned, table, inverse=True)
        norm = {"norm_offset": 0.0, "rstd_TG": unwritten(NUM_ROWS, 2 * NUM_ROWS, dtype=torch.float32)}
        module.norm_rotate((q, k), normed, weights, table, eps=EPS, pre=pre, **norm)
        dweights = zeros(16), zeros(16)
        module.norm_rotate_backward((q, k, v), pre, dx, weights, table, dweights=dweights, num_programs=2, **norm)
        return *turned, *normed, *pre, *dx, *dweights

    assert_placement_changes_nothing(run)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy(softcap):
    module, targets = kernels("cross_entropy"), indices(-100, 7, 299)

    def run(place):
        logits = place(draw(NUM_ROWS, 300, seed=1))
        options = {"softcap": softcap, "scale": 1.0, "grad_scale": zeros(1) + 1, "ignore_index": -100}
        loss = module.cross_entropy_forward_backward_(logits, targets, out=logits, **options)
        return loss, logits

    assert_placement_changes_nothing(run)


def test_rows_of_linear_cross_entropy():
    module, rows, targets = kernels("linear_cross_entropy"), indices(2, 0, 1), indices(3, 5, -100)

    def run(place):
        out = place(zeros(NUM_ROWS, 24, dtype=torch.float16))
        module.put_rows(place(draw(NUM_ROWS, 24, seed=1)), rows, targets, out_TD=out, ignore_index=-100)
        return (out,)

    assert_placement_changes_nothing(run)


@pytest.mark.parametrize("width", [64, 33])
def test_nf4(width):
    module, num_bytes = kernels("nf4"), (NUM_ROWS * width + 1) // 2
    packed = torch.randint(256, (num_bytes,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).to(kernel_device())
    num_blocks = -(-NUM_ROWS * width // 64)
    state = {"code_16": draw(16, seed=2, dtype=torch.float32), "absmax_B": draw(num_blocks, seed=3, dtype=torch.float32), "blocksize": 64}
    state |= dict.fromkeys(("nested_absmax_C", "nested_code_256", "offset")) | {"nested_blocksize": 256}

    def run(place):
        # A spare column, so that the kernel goes by rows in either place.
        out = place(unwritten(NUM_ROWS, width + 8))[:, :width]
        return (module.dequantize(packed, out=out, **state),)

    assert_placement_changes_nothing(run)
