"""AdamW against fp64, torch's own optimizer and bitsandbytes: reference and kernel, states of every kind, groups, odd sizes."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from typing import Any

import pytest
import torch

from finery_kernels import adamw as op
from finery_kernels.adamw import GROUP_BLOCK, QUANTIZATION_BLOCK, Groups, State8bit, reference
from finery_kernels.adamw.state import dynamic_map
from finery_kernels.errors import UnsupportedError
from finery_kernels.testing import (
    ARCHITECTURES,
    assert_within_budget,
    compilation,
    compile_all,
    interpreting,
    kernel_device,
    poisoned,
    random_normal,
    relative_error,
)

IMPLEMENTATIONS = ["reference", "triton"]
SIZES = [1, 255, 1024, 2500]
# Every argument of the raw implementations; `api` fills in what a caller leaves out.
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "step": 3,
    "clip_coef": None,
    "groups": None,
    "shadow_N": None,
    "stochastic_rounding": False,
}


def implementation(name):
    """The raw functions of one implementation and the device they run on; the kernel is interpreted where there is no GPU."""
    module = importlib.import_module(f"finery_kernels.adamw.{name}")
    return module, kernel_device() if name == "triton" else torch.device("cpu")


def draw(size, *, seed=0, device="cpu", params=torch.float32, grads=torch.float32, states=torch.float32):
    """Parameters, gradients and both moments, as after some steps."""
    return (
        random_normal(size, seed=seed, dtype=params, device=device),
        random_normal(size, seed=seed + 1, dtype=grads, device=device, scale=0.1),
        random_normal(size, seed=seed + 2, dtype=states, device=device, scale=0.1),
        random_normal(size, seed=seed + 3, device=device, scale=0.1).square().to(states),
    )


def cpu_groups(size):
    num_blocks = -(-size // GROUP_BLOCK)
    return Groups(torch.arange(num_blocks, dtype=torch.uint8) % 3, torch.tensor([1.0, 16.0, 0.5]), torch.tensor([1.0, 0.0, 2.0]))


def groups_on(groups, device):
    return Groups(*(getattr(groups, field.name).to(device) for field in dataclasses.fields(groups)))


def eager(params, grads, exp_avg, exp_avg_sq, dtype, **options):
    """The textbook's formulas in `dtype`, elementwise, with tables written out in full; in fp64 this is the oracle."""
    values = {**OPTIONS, **options}
    p, g, m, v = (tensor.to(dtype) for tensor in (params, grads, exp_avg, exp_avg_sq))
    lr, decay = torch.full_like(p, float(values["lr"])), torch.full_like(p, values["weight_decay"])
    if (groups := values["groups"]) is not None:
        block = torch.arange(len(p)) // GROUP_BLOCK
        lr = lr * groups.lr_scale_G[groups.group_of_block_B[block].long()].to(dtype)
        decay = decay * groups.decay_scale_G[groups.group_of_block_B[block].long()].to(dtype)
    if values["clip_coef"] is not None:
        g = g * values["clip_coef"].to(dtype)
    m = values["beta1"] * m + (1 - values["beta1"]) * g
    v = values["beta2"] * v + (1 - values["beta2"]) * g * g
    step = int(values["step"])
    m_hat, v_hat = m / (1 - values["beta1"] ** step), v / (1 - values["beta2"] ** step)
    return p - lr * decay * p - lr * m_hat / (v_hat.sqrt() + values["eps"]), m, v


def in_bfloat16(values, *, truncating):
    """Rounded to nearest, or cut off as the interpreter does it."""
    return (values.float().view(torch.int32) & -0x10000).view(torch.float32).bfloat16() if truncating else values.bfloat16()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("grads_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_errs_no_more_than_eager_torch(name, grads_dtype):
    module, device = implementation(name)
    for seed, size in enumerate(SIZES):
        tensors = draw(size, seed=10 * seed, grads=grads_dtype)
        options: dict[str, Any] = {"groups": cpu_groups(size), "clip_coef": torch.tensor(0.37), "step": 1 + 5 * seed}
        p, g, m, v = (tensor.clone().to(device) for tensor in tensors)
        placed = {"groups": groups_on(options["groups"], device), "clip_coef": options["clip_coef"].to(device)}
        module.adamw_(p, g, m, v, **{**OPTIONS, **options, **placed})
        oracle, plain = eager(*tensors, torch.float64, **options), eager(*tensors, torch.float32, **options)
        for key, got, want, rounded in zip("pmv", (p, m, v), oracle, plain, strict=True):
            assert_within_budget(got.cpu(), want, rounded, factor=1.5, name=f"{key} of {size}")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_ten_steps_are_those_of_torchs_optimizer(name):
    module, device = implementation(name)
    start = random_normal(700, seed=1)
    p, m, v = start.clone().to(device), torch.zeros(700, device=device), torch.zeros(700, device=device)
    runs = {dtype: torch.nn.Parameter(start.to(dtype)) for dtype in (torch.float32, torch.float64)}
    optimizers = [torch.optim.AdamW([run], lr=1e-2, weight_decay=0.1) for run in runs.values()]
    for step in range(1, 11):
        grads = random_normal(700, seed=100 + step, scale=step)
        for run in runs.values():
            run.grad = grads.to(run.dtype)
        for optimizer in optimizers:
            optimizer.step()
        module.adamw_(p, grads.to(device), m, v, **{**OPTIONS, "step": step})
    oracle, plain = runs[torch.float64].detach() - start, runs[torch.float32].detach() - start
    assert_within_budget(p.cpu() - start, oracle, plain, factor=1.5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_parameters_are_rounded_once(name):
    module, device = implementation(name)
    tensors = draw(2500, params=torch.bfloat16, grads=torch.bfloat16)
    p, g, m, v = (tensor.clone().to(device) for tensor in tensors)
    module.adamw_(p, g, m, v, **OPTIONS)
    want = in_bfloat16(eager(*tensors, torch.float64)[0], truncating=name == "triton" and interpreting())
    assert (p.cpu() != want).float().mean().item() < 1e-3


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_shadow_holds_the_new_parameters_and_the_tail_is_left_alone(name):
    module, device = implementation(name)
    p, g, m, v = (tensor.to(device) for tensor in draw(1500))
    shadow = poisoned(1600, dtype=torch.bfloat16, device=device)
    module.adamw_(p[:1300], g[:1300], m[:1300], v[:1300], **{**OPTIONS, "shadow_N": shadow[:1300]})
    assert torch.equal(shadow[:1300], in_bfloat16(p[:1300], truncating=name == "triton" and interpreting()))
    assert bool(shadow[1300:].isnan().all())
    for got, want in zip((p, g, m, v), draw(1500), strict=True):
        assert torch.equal(got[1300:].cpu(), want[1300:])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("eight_bit", [False, True])
def test_values_on_the_device_do_what_numbers_do(name, eight_bit):
    module, device = implementation(name)
    runs = []
    for lr, step in ((1e-3, 17), (torch.tensor(1e-3, device=device), torch.tensor(17, dtype=torch.int32, device=device))):
        p, g, m, v = (tensor.to(device) for tensor in draw(1100))
        state = State8bit.zeros(1100, device=device)
        moments = (state,) if eight_bit else (m, v)
        (module.adamw_8bit_ if eight_bit else module.adamw_)(p, g, *moments, **{**OPTIONS, "lr": lr, "step": step})
        runs.append([p, m, v, state.exp_avg_codes_N])
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_moments_are_rounded_up_or_down_with_the_odds_of_the_distances(name):
    module, device = implementation(name)
    value = 1.0 + 2**-9  # a quarter of the way from 1 to the next bf16 value, 1 + 2**-7
    p, g, m, v = (torch.zeros(4096, device=device) for _ in range(4))
    m, v = m.bfloat16() + 1, v.bfloat16() + 1
    g += 1 + 2**-9 / 0.1
    module.adamw_(p, g, m, v, **{**OPTIONS, "beta1": 0.9, "beta2": 0.9})
    assert set(m.float().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(m.float().mean().item() - value) < 4 * 2**-7 * (0.25 * 0.75 / 4096) ** 0.5
    assert set(v.float().tolist()) == {1.0, 1.0 + 2**-7}
    assert not torch.equal(m, v)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_second_moments_shrink_when_gradients_vanish(name):
    module, device = implementation(name)
    p, g, m = (torch.zeros(512, device=device) for _ in range(3))
    m, v = m.bfloat16(), torch.ones(512, device=device).bfloat16()
    for step in range(1, 41):
        module.adamw_(p, g, m, v, **{**OPTIONS, "beta2": 0.999, "step": step})
    assert v.float().mean().item() == pytest.approx(0.999**40, abs=0.002)


@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True}])
def test_kernel_and_reference_draw_the_same_roundings(options):
    module, device = implementation("triton")
    tensors = draw(2500, params=torch.bfloat16, grads=torch.bfloat16, states=torch.bfloat16)
    runs = []
    for run, place in ((module, device), (reference, torch.device("cpu"))):
        p, g, m, v = (tensor.clone().to(place) for tensor in tensors)
        run.adamw_(p, g, m, v, **{**OPTIONS, **options, "step": 123456})
        runs.append([tensor.cpu() for tensor in (p, m, v)])
    skipped = 1 if interpreting() and not options else 0
    for got, want in list(zip(*runs, strict=True))[skipped:]:
        assert (got != want).float().mean().item() < 2e-3


def test_roundings_depend_on_place_and_step():
    noise = reference._noise(slice(0, 4096), 5, torch.device("cpu"))
    assert len(set(noise.tolist())) > 4090
    assert not torch.equal(noise, reference._noise(slice(0, 4096), 6, torch.device("cpu")))
    assert torch.equal(noise[1000:], reference._noise(slice(1000, 4096), torch.tensor(5), torch.device("cpu")))
    assert noise.double().mean().item() == pytest.approx(2**31, rel=0.05)
    far = reference._noise(slice(2**33, 2**33 + 4096), 5, torch.device("cpu"))
    assert not torch.equal(noise, far)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed=signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_eight_bit_steps_are_those_of_bitsandbytes(name):
    """bitsandbytes' CPU code rounds small magnitudes more coarsely than its CUDA code, so every step starts from its states."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module, device = implementation(name)
    size = 4096 + 300
    parameter = torch.nn.Parameter(random_normal(size, seed=1))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-2, weight_decay=0.1)
    state = State8bit.zeros(size, device=device)
    names = {"exp_avg_codes_N": "state1", "exp_avg_absmax_B": "absmax1", "exp_avg_sq_codes_N": "state2", "exp_avg_sq_absmax_B": "absmax2"}
    for step in range(1, 4):
        parameter.grad = random_normal(size, seed=step + 1, scale=0.1) * random_normal(size, seed=50)
        before = parameter.detach().clone()
        p = before.clone().to(device)
        optimizer.step()
        module.adamw_8bit_(p, parameter.grad.to(device), state, **{**OPTIONS, "step": step})
        torch.testing.assert_close(p.cpu() - before, parameter.detach() - before, rtol=1e-4, atol=3e-7)
        for ours, theirs in names.items():
            got, want = getattr(state, ours), optimizer.state[parameter][theirs]
            if ours.endswith("absmax_B"):
                torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=0)
            else:
                code_map = dynamic_map(signed=ours == "exp_avg_codes_N")
                large = code_map[want.long()].abs() > 1e-3
                difference = (got.cpu().int() - want.int()).abs()[large]
                assert int(difference.max()) <= 1
                assert difference.float().mean().item() < 0.02
            got.copy_(want)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1, 256, 1300])
def test_codes_are_the_nearest_and_scales_the_largest(name, size):
    module, device = implementation(name)
    p, g, _, _ = (tensor.to(device) for tensor in draw(size))
    # Magnitudes over ten decades, some of them zero, and one block of zeros.
    g *= 10.0 ** -(torch.arange(size, device=device) % 11)
    g[::7] = 0
    g[512:768] = 0
    state = State8bit.zeros(size, device=device)
    module.adamw_8bit_(p, g, state, **{**OPTIONS, "step": 1})
    g = g.double().cpu()
    for codes, absmax, moment, signed in (
        (state.exp_avg_codes_N, state.exp_avg_absmax_B, 0.1 * g, True),
        (state.exp_avg_sq_codes_N, state.exp_avg_sq_absmax_B, 0.001 * g * g, False),
    ):
        padded = torch.nn.functional.pad(moment, (0, -size % QUANTIZATION_BLOCK)).view(-1, QUANTIZATION_BLOCK)
        scale = padded.abs().amax(1)
        torch.testing.assert_close(absmax.cpu().double(), scale, rtol=1e-6, atol=0)
        scaled = (padded / scale.clamp(min=1e-30).unsqueeze(1)).view(-1)[:size]
        code_map = dynamic_map(signed=signed).double()
        least = (scaled.unsqueeze(1) - code_map).abs().min(dim=1).values
        got = (scaled - code_map[codes.cpu().long()]).abs()
        allowed = least * (1 + 1e-4) + 1e-6 * scaled.abs()
        if not signed:
            assert bool((codes.cpu()[moment > 0] > 0).all())
            assert bool((codes.cpu()[moment == 0] == 0).all())
            allowed[codes.cpu() == 1] = code_map[1].item()
        assert bool((got <= allowed).all())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_vanishing_gradient_does_not_throw_an_eight_bit_parameter_away(name):
    module, device = implementation(name)
    p, state = torch.zeros(256, device=device), State8bit.zeros(256, device=device)
    g = torch.full((256,), 1e-4, device=device)
    g[0] = 1.0
    module.adamw_8bit_(p, g, state, **{**OPTIONS, "step": 1})
    module.adamw_8bit_(p, torch.zeros_like(g), state, **{**OPTIONS, "step": 2})
    assert float(p.abs().max()) < 5 * OPTIONS["lr"]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_eight_bit_steps_keep_groups_clipping_and_shadow(name):
    module, device = implementation(name)
    size = 2500
    params, grads, _, _ = draw(size)
    options: dict[str, Any] = {"groups": cpu_groups(size), "clip_coef": torch.tensor(0.25), "step": 1}
    shadow = poisoned(size, dtype=torch.bfloat16, device=device)
    p, state = params.clone().to(device), State8bit.zeros(size, device=device)
    placed = {"groups": groups_on(options["groups"], device), "clip_coef": options["clip_coef"].to(device), "shadow_N": shadow}
    module.adamw_8bit_(p, grads.to(device), state, **{**OPTIONS, **options, **placed})
    zeros = torch.zeros(size)
    oracle, plain = (eager(params, grads, zeros, zeros, dtype, **options)[0] for dtype in (torch.float64, torch.float32))
    assert_within_budget(p.cpu(), oracle, plain, factor=1.5)
    assert torch.equal(shadow.cpu(), in_bfloat16(p.cpu(), truncating=name == "triton" and interpreting()))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_runs_repeat_bit_by_bit(name):
    module, device = implementation(name)
    runs = []
    for _ in range(2):
        p, g, m, v = (tensor.to(device) for tensor in draw(1100, params=torch.bfloat16, states=torch.bfloat16))
        state, q = State8bit.zeros(1100, device=device), p.clone()
        module.adamw_(p, g, m, v, **{**OPTIONS, "stochastic_rounding": True})
        module.adamw_8bit_(q, g, state, **{**OPTIONS, "stochastic_rounding": True})
        runs.append((p, m, v, q, state.exp_avg_codes_N, state.exp_avg_sq_codes_N, module.grad_norm(g)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_elements_are_fine(name):
    module, device = implementation(name)
    empty = torch.zeros(0, device=device)
    module.adamw_(empty, empty, empty, empty, **OPTIONS)
    module.adamw_8bit_(empty, empty, State8bit.zeros(0, device=device), **OPTIONS)
    assert module.grad_norm(empty).item() == 0.0


@pytest.mark.parametrize(("name", "dtype"), [*itertools.product(IMPLEMENTATIONS, [torch.float32, torch.bfloat16, torch.float16])])
def test_the_norm_is_that_of_fp64(name, dtype):
    module, device = implementation(name)
    for size in (1, 1000, 70_001):
        grads = random_normal(size, seed=size, dtype=dtype, device=device, scale=3.0)
        norm = module.grad_norm(grads)
        assert norm.dtype == torch.float32
        assert norm.ndim == 0
        assert relative_error(norm, torch.linalg.vector_norm(grads.double())) < 2e-7


def test_clipping_is_that_of_torch():
    for scale in (0.01, 10.0):
        parameter = torch.nn.Parameter(torch.zeros(100))
        parameter.grad = random_normal(100, seed=1, scale=scale)
        grads = parameter.grad.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        torch.testing.assert_close(grads * op.clip_coefficient(op.grad_norm(grads), max_norm=1.0), parameter.grad)


def test_the_public_function_steps_parameters_that_want_gradients():
    p, g, m, v = draw(300)
    want = eager(p, g, m, v, torch.float64, weight_decay=0.0, lr=1e-3)[0]
    p.requires_grad_()
    op.adamw_(p, g, m, v, lr=1e-3, step=3)
    torch.testing.assert_close(p.detach().double(), want, rtol=1e-6, atol=1e-6)
    q, g, m, v = (tensor.double() for tensor in draw(300))
    op.adamw_(q, g, m, v, lr=1e-3, step=torch.tensor(3))
    torch.testing.assert_close(q, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params_N": torch.zeros(2, 4)}, r"params has shape \(2, 4\); a flat buffer \[N\] is wanted"),
        ({"params_N": torch.zeros(8, dtype=torch.float16)}, "params is torch.float16"),
        ({"grads_N": torch.zeros(9)}, r"grads is torch.float32 \(9,\).*shape \(8,\)"),
        ({"grads_N": torch.zeros(16)[::2]}, r"grads is .* with strides \(2,\)"),
        ({"exp_avg_N": torch.zeros(8, dtype=torch.bfloat16)}, "exp_avg is torch.bfloat16 and exp_avg_sq torch.float32; one dtype"),
        ({"exp_avg_sq_N": torch.zeros(8, device="meta")}, "exp_avg_sq is .* on meta"),
        ({"shadow_N": torch.zeros(8)}, "shadow is torch.float32"),
        ({"stochastic_rounding": True}, "stochastic_rounding with params of torch.float32"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"step": 0}, "step is 0; 1 or more"),
        ({"step": torch.tensor(1.0)}, "step is torch.float32"),
        ({"lr": torch.ones(1)}, r"lr is torch.float32 \(1,\).*0-dim"),
        ({"clip_coef": torch.tensor(1.0, dtype=torch.float64)}, "clip_coef is torch.float64"),
        ({"groups": Groups(torch.zeros(2, dtype=torch.uint8), torch.ones(1), torch.ones(1))}, r"groups.group_of_block is .*shape \(1,\)"),
        ({"groups": Groups(torch.zeros(1, dtype=torch.uint8), torch.ones(2), torch.ones(1))}, r"groups.decay_scale is"),
    ],
)
def test_unsupported_inputs_are_named(change, message):
    arguments = {name: torch.zeros(8) for name in ("params_N", "grads_N", "exp_avg_N", "exp_avg_sq_N")} | {"lr": 1e-3, "step": 1, **change}
    positional = [arguments.pop(name) for name in ("params_N", "grads_N", "exp_avg_N", "exp_avg_sq_N")]
    with pytest.raises(UnsupportedError, match=message):
        op.adamw_(*positional, **arguments)


def test_unsupported_states_and_norms_are_named():
    state = State8bit.zeros(300, device="cpu")
    with pytest.raises(UnsupportedError, match=r"state.exp_avg_codes is torch.uint8 \(300,\).*shape \(301,\)"):
        op.adamw_8bit_(torch.zeros(301), torch.zeros(301), state, lr=1e-3, step=1)
    short = dataclasses.replace(state, exp_avg_sq_absmax_B=torch.zeros(1))
    with pytest.raises(UnsupportedError, match=r"state.exp_avg_sq_absmax is .*shape \(2,\)"):
        op.adamw_8bit_(torch.zeros(300), torch.zeros(300), short, lr=1e-3, step=1)
    with pytest.raises(UnsupportedError, match="params is torch.float64"):
        op.adamw_8bit_(torch.zeros(300).double(), torch.zeros(300), state, lr=1e-3, step=1)
    with pytest.raises(UnsupportedError, match="grads is torch.int32"):
        op.grad_norm(torch.zeros(3, dtype=torch.int32))


POINTERS = {
    "params_ptr": "*fp32",
    "grads_ptr": "*bf16",
    "exp_avg_ptr": "*fp32",
    "exp_avg_sq_ptr": "*fp32",
    "shadow_ptr": "*bf16",
    "step_ptr": "*i32",
    "group_ptr": "*u8",
    "codes_ptr": "*u8",
    "codes_sq_ptr": "*u8",
    "partial_ptr": "*fp64",
}
OPTIONAL = ["shadow_ptr", "lr_ptr", "step_ptr", "clip_ptr", "group_ptr", "lr_scale_ptr", "decay_scale_ptr"]
INTEGERS = {"num_elements": "i64", "num_blocks": "i64", "num_tiles": "i32", "step": "i32"}


def _order(kernel, arch, constants, *, num_warps=4, **pointers):
    types = {**POINTERS, **INTEGERS, **pointers}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "fp32") for name in names}
    return compilation(kernel, signature, constants, arch, divisible=["num_elements"], num_warps=num_warps)


def _orders(arch):
    kernels = importlib.import_module("finery_kernels.adamw.triton")
    plain, blocks = {"BLOCK": GROUP_BLOCK}, {"ROWS": GROUP_BLOCK // QUANTIZATION_BLOCK, "COLUMNS": QUANTIZATION_BLOCK}
    half = {"params_ptr": "*bf16", "exp_avg_ptr": "*bf16", "exp_avg_sq_ptr": "*bf16"}
    bare = dict.fromkeys(OPTIONAL)
    return [
        _order(kernels.adamw_kernel, arch, {**plain, "STOCHASTIC": False}),
        _order(kernels.adamw_kernel, arch, {**plain, **bare, "STOCHASTIC": True}, **half),
        _order(kernels.adamw_8bit_kernel, arch, {**blocks, "STOCHASTIC": False}),
        _order(kernels.adamw_8bit_kernel, arch, {**blocks, **bare, "STOCHASTIC": True}, params_ptr="*bf16"),
        _order(kernels.norm_partial_kernel, arch, {"BLOCK": kernels.NORM_BLOCK}, num_warps=8),
        _order(kernels.norm_total_kernel, arch, {"PROGRAMS": kernels.MAX_NORM_PROGRAMS}),
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_and_move_16_bytes_at_a_time(arch):
    compiled = compile_all(_orders(arch))
    assert [kernel.stack_bytes for kernel in compiled] == [0] * len(compiled), "nothing is spilled"
    for kernel in compiled[:4]:
        assert "ld.global.v4" in kernel.ptx
        assert "st.global.v4" in kernel.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("grads_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_keeps_the_budget(grads_dtype):
    size = 1_000_003
    tensors = draw(size, grads=grads_dtype)
    groups, coefficient = cpu_groups(size), torch.tensor(0.7)
    p, g, m, v = (tensor.cuda() for tensor in tensors)
    shadow = poisoned(size, dtype=torch.bfloat16, device="cuda")
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "step": 9}
    op.adamw_(p, g, m, v, **options, groups=groups_on(groups, "cuda"), clip_coef=coefficient.cuda(), shadow_N=shadow)
    oracle, plain = (eager(*tensors, dtype, **options, groups=groups, clip_coef=coefficient) for dtype in (torch.float64, torch.float32))
    for got, want, rounded in zip((p, m, v), oracle, plain, strict=True):
        assert_within_budget(got.cpu(), want, rounded, factor=1.5)
    assert torch.equal(shadow, p.bfloat16())


@pytest.mark.gpu
def test_a_gpu_and_the_reference_take_the_same_eight_bit_steps():
    size = 100_003
    params, _, _, _ = draw(size)
    runs = []
    for device in ("cuda", "cpu"):
        p, state = params.clone().to(device), State8bit.zeros(size, device=device)
        for step in range(1, 6):
            grads = random_normal(size, seed=step, device=device, scale=0.1)
            op.adamw_8bit_(p, grads, state, lr=1e-2, weight_decay=0.1, step=step)
        runs.append([tensor.cpu() for tensor in (p, state.exp_avg_codes_N, state.exp_avg_sq_codes_N, state.exp_avg_absmax_B)])
    (p, codes, codes_sq, absmax), (want_p, want_codes, want_codes_sq, want_absmax) = runs
    assert (codes != want_codes).float().mean().item() < 1e-3
    assert (codes_sq != want_codes_sq).float().mean().item() < 1e-3
    torch.testing.assert_close(absmax, want_absmax, rtol=1e-2, atol=0)
    assert relative_error(p - params, want_p - params) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_captured_step_takes_new_rates_and_counts_on(eight_bit):
    size = 50_000
    p, g, m, v = (tensor.cuda() for tensor in draw(size))
    want, state, want_state = p.clone(), State8bit.zeros(size, device="cuda"), State8bit.zeros(size, device="cuda")
    lr, step = torch.tensor(0.0, device="cuda"), torch.tensor(0, dtype=torch.int64, device="cuda")

    def take(params, moments, **options):
        coefficient = op.clip_coefficient(op.grad_norm(g), max_norm=1.0)
        (op.adamw_8bit_ if eight_bit else op.adamw_)(params, g, *moments, clip_coef=coefficient, **options)

    moments, want_moments = ((state,), (want_state,)) if eight_bit else ((m, v), (m.clone(), v.clone()))
    take(p.clone(), (State8bit.zeros(size, device="cuda"),) if eight_bit else (m.clone(), v.clone()), lr=lr, step=step + 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step += 1
        take(p, moments, lr=lr, step=step)
    for count in range(1, 4):
        lr.fill_(10.0**-count)
        graph.replay()
        take(want, want_moments, lr=10.0**-count, step=count)
    assert relative_error(p, want) < 1e-6


@pytest.mark.gpu
def test_elements_beyond_two_to_the_31_are_reached():
    size, tail = 2**31 + 5000, 5000 + GROUP_BLOCK
    p, g = (torch.zeros(size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    g[-tail:] = random_normal(tail, seed=1, dtype=torch.bfloat16, device="cuda")
    state = State8bit.zeros(size, device="cuda")
    shadow = torch.full_like(p, float("nan"))
    op.adamw_8bit_(p, g, state, lr=1.0, step=1, shadow_N=shadow)
    torch.testing.assert_close(p[-tail:], -g[-tail:].sign())
    torch.testing.assert_close(shadow[-tail:], -g[-tail:].sign())
    assert not bool(p[:-tail].any())
    assert relative_error(op.grad_norm(g), torch.linalg.vector_norm(g[-tail:].double())) < 1e-6


@pytest.mark.gpu
def test_a_gpu_repeats_itself_bit_by_bit():
    grads = random_normal(3_000_001, seed=1, device="cuda")
    norms = [op.grad_norm(grads) for _ in range(4)]
    assert all(torch.equal(norm, norms[0]) for norm in norms)
    assert relative_error(norms[0], torch.linalg.vector_norm(grads.double())) < 2e-7
