"""The engine's layers on a GPU: bf16 against transformers' own bf16, every way through the same batch, NF4. Needs no fixture."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def families():
    import test_engine_families

    return test_engine_families


def in_bfloat16(model):
    """On the GPU, base weights in bf16 and adapters in fp32, as a run has them."""
    model = copy.deepcopy(model).cuda()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite", "smollm3"])
def test_bfloat16_gradients_err_as_transformers_own_do(families, family):
    from finery_trainer.engine.packing import pack
    from finery_trainer.engine.stack import TrainingStack

    model, rows = families._with_lora(families._model(family), family), families._rows()
    _, exact = families._gradients(copy.deepcopy(model).double(), rows)
    eager = copy.deepcopy(model).bfloat16()
    _, plain = families._gradients(eager, rows)
    ours = in_bfloat16(model)
    num_labels = sum(int((targets != -100).sum()) for _, targets in rows)
    for plan in families._plans(3).values():
        stack = TrainingStack(ours, plan=plan)
        stack.zero_grad()
        stack.forward_backward(pack(rows, token_multiple=8, label_multiple=4).to(torch.device("cuda")), num_labels=num_labels)
        got = {name: stack.gradient_of(p).cpu() for name, p in ours.named_parameters() if p.requires_grad}
        # Over all of a model's gradients together: one small matrix's error is mostly chance.
        error, budget = (sum(families._error(of[name], exact[name]) ** 2 for name in exact) ** 0.5 for of in (got, plain))
        assert error <= 1.5 * budget


def small_model(*, nf4=False):
    """A Llama of head size 64, large enough for every kernel's usual path."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=4096)).to("cuda", torch.bfloat16)
    if nf4:
        quantize(model)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=linears, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, device="cuda") * 0.02
    return model


def quantize(model):
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    quantized = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4", device="cuda")
                    quantized.weight = Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4").cuda()
                    setattr(block, name, quantized)


def batches(lengths, **options):
    from finery_trainer.engine.packing import pack

    rng = np.random.default_rng(0)
    rows = [(ids, np.append(ids[1:], -100)) for ids in (rng.integers(0, 4096, length) for length in lengths)]
    return pack(rows, **options)


def gradients(stack, batch):
    stack.zero_grad()
    loss = stack.forward_backward(batch.to(torch.device("cuda")), num_labels=batch.num_labels).item()
    return loss, [group.grads_N.clone() for group in stack.groups]


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("lengths", [(256,) * 4, (300, 17, 500, 1, 206)])
def test_host_memory_tiles_and_kept_weights_change_nothing_but_rounding(nf4, lengths):
    from finery_trainer.engine.block import RECOMPUTABLE
    from finery_trainer.engine.planner import Plan, keep_all
    from finery_trainer.engine.stack import TrainingStack

    stack, batch = TrainingStack(small_model(nf4=nf4)), batches(lengths)
    loss, wanted = gradients(stack, batch)
    nothing, everything = (frozenset(),) * 6, (frozenset({"x", *RECOMPUTABLE}),) * 6
    resident = frozenset((layer, name) for layer in (0, 3) for name in ("qkv", "o", "gate_up", "down")) if nf4 else frozenset()
    plans = [
        Plan(card=nothing, host=nothing),
        Plan(card=nothing, host=everything),
        Plan(card=nothing, host=(frozenset({"x", "o"}), frozenset({"x", "gate_up"})) * 3, mlp_rows=300, head_rows=100),
        Plan(card=keep_all(6).card, host=nothing, resident=resident),
    ]
    for plan in plans:
        stack.follow(plan)
        for _ in range(3):
            got_loss, got = gradients(stack, batch)
            assert got_loss == pytest.approx(loss, rel=1e-3)
            for each, whole in zip(got, wanted, strict=True):
                assert float((each - whole).norm() / whole.norm()) < 2e-2


def test_a_replayed_graph_gives_what_the_launches_give():
    from finery_trainer.engine.graphs import GraphedPasses, in_buckets
    from finery_trainer.engine.stack import TrainingStack

    stack = TrainingStack(small_model())
    passes = GraphedPasses(stack)
    for lengths in ((100, 30, 57), (90, 50, 20), (64, 64, 3), (120, 7, 60), (10, 70, 80)):
        batch = in_buckets(batches(lengths, token_multiple=256, label_multiple=128)).pinned()
        loss, wanted = gradients(stack, batch)
        stack.zero_grad()
        got = passes.forward_backward(batch, num_labels=batch.num_labels).item()
        assert got == pytest.approx(loss, rel=1e-4)
        for group, whole in zip(stack.groups, wanted, strict=True):
            assert float((group.grads_N - whole).norm() / whole.norm()) < 1e-2
    assert len(passes._captured) == 1
