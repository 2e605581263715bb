"""Passes that run some layers' backward passes only: right gradients down to the first gap, and nothing left over for the next pass."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch

from finery_trainer.engine.block import RECOMPUTABLE
from finery_trainer.engine.packing import PackedBatch, pack
from finery_trainer.engine.planner import Plan, keep_all
from finery_trainer.engine.stack import TrainingStack

NUM_LAYERS = 4
NOTHING = (frozenset[str](),) * NUM_LAYERS


def stack_of(*, lora: bool, device: str = "cpu") -> TrainingStack:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, head_dim=64, num_hidden_layers=NUM_LAYERS, tie_word_embeddings=False))
    if lora:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    if device == "cuda":
        # As a run has them: adapters stay in float32.
        for name, parameter in model.cuda().named_parameters():
            parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
    return TrainingStack(model)


def batch_of(seed: int, device: torch.device) -> PackedBatch:
    ids = np.random.default_rng(seed).integers(0, 97, 128)
    return pack([(ids, np.append(ids[1:], -100))]).to(device)


def gradients(
    stack: TrainingStack, batch: PackedBatch, *, backward_layers: Collection[int] | None = None
) -> tuple[float, list[torch.Tensor]]:
    """(loss, the gradient of every trained parameter, in order)."""
    stack.zero_grad()
    loss = stack.forward_backward(batch, num_labels=batch.num_labels, backward_layers=backward_layers).item()
    return loss, [group.grad_of(index).clone() for group in stack.groups for index in range(len(group.members))]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("plan", [keep_all(NUM_LAYERS), Plan(card=NOTHING, host=NOTHING)])
def test_the_last_layers_gradients_are_those_of_a_whole_pass(lora, plan):
    stack = stack_of(lora=lora)
    stack.follow(plan)
    batch = batch_of(0, stack.device)
    whole_loss, whole = gradients(stack, batch)
    loss, part = gradients(stack, batch, backward_layers={2, 3})
    assert loss == whole_loss
    there = [gradient.any().item() for gradient in part]
    assert all(torch.equal(got, wanted) for got, wanted, is_there in zip(part, whole, there, strict=True) if is_there)
    # Of four layers half have theirs, and besides them the last norm and the head where they train.
    assert sum(there) == (len(whole) - 3) // 2 + 2 if not lora else len(whole) // 2


@pytest.mark.gpu
@pytest.mark.parametrize("backward_layers", [set[int](), {3}, {2, 3}, {0, 3}])
def test_what_stayed_on_the_host_is_not_taken_for_the_next_pass_s(backward_layers):
    stack = stack_of(lora=True, device="cuda" if torch.cuda.is_available() else "cpu")
    everything = frozenset({"x", *RECOMPUTABLE})
    stack.follow(Plan(card=NOTHING, host=(everything,) * NUM_LAYERS))
    wanted = gradients(stack, batch_of(1, stack.device))
    gradients(stack, batch_of(0, stack.device), backward_layers=backward_layers)
    got = gradients(stack, batch_of(1, stack.device))
    assert got[0] == pytest.approx(wanted[0], rel=1e-3)
    for one, other in zip(got[1], wanted[1], strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()
