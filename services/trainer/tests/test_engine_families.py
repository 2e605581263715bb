"""Every family that the engine replaces agrees with transformers on random tiny models: logits, loss, all gradients.

The judge is transformers in float64; the budget is transformers' own error in float32.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from finery_trainer.engine.architecture import describe
from finery_trainer.engine.block import RECOMPUTABLE
from finery_trainer.engine.packing import IGNORE, pack
from finery_trainer.engine.planner import Plan, keep_all
from finery_trainer.engine.stack import TrainingStack

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _configs():
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        GraniteConfig,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        Qwen2Config,
        Qwen3Config,
        SmolLM3Config,
    )

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    return {
        "llama": LlamaConfig(**SIZES, rope_parameters=llama3, attention_bias=True, mlp_bias=True),
        "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
        "mistral": MistralConfig(**SIZES, sliding_window=5, head_dim=8),
        "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
        "qwen3": Qwen3Config(**SIZES, head_dim=16),
        "gemma2": Gemma2Config(
            **SIZES, head_dim=16, sliding_window=4, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
        ),
        "gemma3": Gemma3TextConfig(
            **SIZES,
            head_dim=16,
            sliding_window=4,
            query_pre_attn_scalar=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "phi3": Phi3Config(**SIZES, sliding_window=6, resid_pdrop=0.0, embd_pdrop=0.0, partial_rotary_factor=0.5),
        "granite": GraniteConfig(
            **SIZES,
            embedding_multiplier=6.0,
            residual_multiplier=0.22,
            attention_multiplier=0.1,
            logits_scaling=4.0,
            attention_bias=True,
            mlp_bias=True,
        ),
        "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    }


FAMILIES = list(_configs())


def _model(family, *, dtype=torch.float32, seed=0):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_configs()[family], dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights and biases are constants at the start; a test must see them.
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05))
    return model.to(dtype)


def _rows(seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for length in (11, 1, 7, 16):
        ids = rng.integers(0, SIZES["vocab_size"], length)
        targets = np.append(ids[1:], IGNORE)
        targets[rng.random(length) < 0.3] = IGNORE
        rows.append((ids, targets))
    rows[0][1][2] = 5
    rows[2][0][3] = SIZES["pad_token_id"]
    return rows


def _transformers_loss(model, rows):
    """Summed over labels, each row on its own."""
    total = torch.zeros(())
    for ids, targets in rows:
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
        logits = logits.float() if logits.dtype != torch.float64 else logits
        total = total + functional.cross_entropy(logits, torch.from_numpy(targets), ignore_index=IGNORE, reduction="sum")
    return total


def _with_lora(model, family):
    from peft import LoraConfig, get_peft_model

    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] if family == "phi3" else LINEARS
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=names, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


def _gradients(model, rows):
    num_labels = sum(int((targets != IGNORE).sum()) for _, targets in rows)
    loss = _transformers_loss(model, rows) / num_labels
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _error(got, wanted):
    return float((got.detach().double() - wanted.detach()).norm() / (wanted.detach().norm() + 1e-12))


def _plans(num_layers):
    nothing = (frozenset(),) * num_layers
    some = (frozenset({"o", "gate_up"}), frozenset({"qkv", "x2"}), frozenset({"h1", "h2", "act"}))
    return {
        "keep all": keep_all(num_layers),
        "recompute all": Plan(card=nothing, host=nothing, head_rows=1024),
        "mixed, tiled": Plan(card=some, host=nothing, mlp_rows=16, head_rows=5, head_groups=2),
    }


def _stack_gradients(stack, model, rows, **options):
    num_labels = sum(int((targets != IGNORE).sum()) for _, targets in rows)
    stack.zero_grad()
    loss = stack.forward_backward(pack(rows, **options), num_labels=num_labels).item()
    return loss, {name: stack.gradient_of(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def _check(model, reference, rows, plan, **options):
    """`model` through the engine against `reference` (the same weights) through transformers."""
    exact_loss, exact = _gradients(copy.deepcopy(reference).double(), rows)
    eager_loss, eager = _gradients(reference, rows)
    stack = TrainingStack(model, plan=plan)
    loss, got = _stack_gradients(stack, model, rows, **options)
    assert abs(loss - exact_loss) <= 4 * abs(eager_loss - exact_loss) + 2e-6 * exact_loss
    assert got.keys() == exact.keys()
    for name, wanted in exact.items():
        budget = 4 * _error(eager[name], wanted) + 1e-6
        assert _error(got[name], wanted) <= budget, (name, _error(got[name], wanted), budget)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    model, rows = _model(family), _rows()
    exact = copy.deepcopy(model).double()
    wanted = torch.cat([exact(input_ids=torch.from_numpy(ids)[None]).logits[0] for ids, _ in rows])
    eager = torch.cat([model(input_ids=torch.from_numpy(ids)[None]).logits[0] for ids, _ in rows])
    got = TrainingStack(model).logits(pack(rows))
    assert _error(got, wanted) <= 4 * _error(eager, wanted) + 1e-7


@pytest.mark.parametrize("plan", list(_plans(3)))
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_gradients_are_those_of_transformers_and_peft(family, plan):
    model = _with_lora(_model(family), family)
    _check(model, copy.deepcopy(model), _rows(), _plans(3)[plan], token_multiple=8, label_multiple=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_all_weights_are_those_of_transformers(family):
    model = _model(family)
    _check(model, copy.deepcopy(model), _rows(), _plans(3)["mixed, tiled"])


@pytest.mark.parametrize(("family", "offset"), [("llama", 0), ("qwen3", 3), ("gemma2", 6)])
def test_any_plan_gives_the_same_bits(family, offset):
    model, rows = _with_lora(_model(family), family), _rows()
    stack = TrainingStack(model)
    loss, wanted = _stack_gradients(stack, model, rows)
    subsets = [frozenset(c) for size in range(len(RECOMPUTABLE) + 1) for c in itertools.combinations(RECOMPUTABLE, size)]
    for start in range(0, len(subsets), 9):
        # A stride that is no divisor: over the layers and families every subset comes up somewhere.
        card = tuple(subsets[(start + 43 * layer + offset) % len(subsets)] for layer in range(3))
        stack.follow(Plan(card=card, host=(frozenset(),) * 3))
        got_loss, got = _stack_gradients(stack, model, rows)
        assert got_loss == loss
        assert all(torch.equal(got[name], wanted[name]) for name in wanted), card


def test_models_that_are_not_replaced_are_told_why():
    from transformers import GPT2Config, LlamaConfig, Phi3Config

    dynamic = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    assert "model_type gpt2 is not among" in str(describe(GPT2Config()))
    assert "rope_type is dynamic" in str(describe(LlamaConfig(**SIZES, rope_parameters=dynamic)))
    longrope = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi3 = Phi3Config(**SIZES, original_max_position_embeddings=32, rope_parameters=longrope, resid_pdrop=0.0, embd_pdrop=0.0)
    assert "rope_type is longrope" in str(describe(phi3))
    assert "attention_dropout is 0.1" in str(describe(LlamaConfig(**SIZES, attention_dropout=0.1)))
    assert "activation relu" in str(describe(LlamaConfig(**SIZES, hidden_act="relu")))
