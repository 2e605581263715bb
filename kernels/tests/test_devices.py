"""Tensors on a GPU that is not the current one: every kernel is launched where its tensors lie, as its reference's results show."""

from __future__ import annotations

import pytest
import torch

from finery_kernels import adamw, attention, cross_entropy, glu, layer_norm, linear_cross_entropy, lora, nf4, rms_norm, rope
from finery_kernels.nf4.api import NF4_CODE
from finery_kernels.testing import random_normal

EPS = 1e-5


def draw(*shape, seed, device):
    return random_normal(*shape, seed=seed, device=device)


def norms(device):
    x, weight, bias = draw(5, 64, seed=1, device=device), draw(64, seed=2, device=device), draw(64, seed=3, device=device)
    return rms_norm.rms_norm(x, weight, eps=EPS), layer_norm.layer_norm(x, weight, bias, eps=EPS)


def rotations(device):
    q, k, table = draw(5, 4, 16, seed=1, device=device), draw(5, 2, 16, seed=2, device=device), draw(5, 16, seed=3, device=device)
    positions, weight = torch.arange(5, device=device), draw(16, seed=4, device=device)
    return *rope.rope(q, k, table, table, positions), *rope.qk_norm_rope(q, k, weight, weight, table, table, positions, eps=EPS)


def glus(device):
    return tuple(glu.glu(draw(5, 128, seed=1, device=device), activation=name) for name in ("silu", "gelu", "gelu_tanh"))


def losses(device):
    logits, h, weight = (draw(*shape, seed=seed, device=device) for seed, shape in enumerate([(5, 300), (5, 64), (300, 64)]))
    targets = torch.tensor([3, -100, 299, 0, 7], device=device)
    grad_scale = torch.ones((), device=device)
    loss = cross_entropy.cross_entropy_forward_backward_(logits, targets, grad_scale=grad_scale)
    rows = torch.tensor([4, 0, 3], device=device)
    options = {"grad_scale": grad_scale, "rows_L": rows}
    return loss, logits, *linear_cross_entropy.linear_cross_entropy_forward_backward(h, weight, targets[rows], **options)


def weights(device):
    packed = torch.randint(256, (64 * 32,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).to(device)
    code, absmax = torch.tensor(NF4_CODE, device=device), draw(64, seed=2, device=device)
    state = nf4.Nf4State(shape=(64, 64), dtype=torch.float32, code_16=code, absmax_B=absmax)
    adapter = lora.Adapter(draw(8, 64, seed=3, device=device), draw(64, 8, seed=4, device=device), 2.0)
    weight = nf4.dequantize(packed, state)
    return weight, lora.lora_projection(draw(5, 64, seed=5, device=device), [weight], [adapter])


def optimizers(device):
    p, g, m, v = (draw(2500, seed=seed, device=device) for seed in range(4))
    adamw.adamw_(p, g, m, v.square_(), lr=1e-2, step=3)
    p_8bit, state = draw(2500, seed=0, device=device), adamw.State8bit.zeros(2500, device=device)
    adamw.adamw_8bit_(p_8bit, g, state, lr=1e-2, step=1)
    return p, m, v, p_8bit, adamw.grad_norm(g)


def attentions(device):
    q, k, v = (draw(6, heads, 16, seed=heads, device=device) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    if device == "cpu":
        return (attention.attention(q, k, v, cu_seqlens=bounds, max_seqlen=4),)
    return (attention.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu_seqlens=bounds, max_seqlen=4).float(),)


@pytest.mark.gpu
@pytest.mark.parametrize("run", [norms, rotations, glus, losses, weights, optimizers, attentions])
def test_a_gpu_that_is_not_the_current_one_computes_the_same(run):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    tolerance = 2e-2 if run is attentions else 1e-4
    for got, want in zip(run("cuda:1"), run("cpu"), strict=True):
        assert got.device == torch.device("cuda:1")
        torch.testing.assert_close(got.cpu(), want, rtol=tolerance, atol=tolerance)
