"""Learning rates of their own: LoRA's B, and embeddings and head."""

from __future__ import annotations

import pytest
import torch

from finery_common.spec import TrainingSpec
from finery_trainer import engine
from finery_trainer.engine.optim import rate_factors


def factors_of(base_dir, **fields) -> dict[str, float]:
    """By parameter's name; 1 where there is none."""
    spec = TrainingSpec.parse({"base_model": "tiny", "max_sequence_length": 64, **fields})
    model = engine.load(spec, base_dir, device=torch.device("cpu"))
    factors = rate_factors(model, spec)
    return {name: factors.get(parameter, 1.0) for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_parameter_has_the_one_rate_by_default(tiny_base_dir):
    assert set(factors_of(tiny_base_dir).values()) == {1.0}


@pytest.mark.parametrize("method", ["lora", "dpo"])
def test_lora_plus_multiplies_the_rate_of_b_alone(tiny_base_dir, method):
    factors = factors_of(tiny_base_dir, method=method, lora={"b_learning_rate_ratio": 16.0})
    assert {name for name, factor in factors.items() if factor == 16.0} == {name for name in factors if "lora_B" in name}
    assert {factor for name, factor in factors.items() if "lora_A" in name} == {1.0}


def test_embeddings_and_head_follow_their_own_rate_and_an_adapters_b_both():
    names = ("model.embed_tokens.weight", "lm_head.lora_A.default.weight", "lm_head.lora_B.default.weight", "model.norm.weight")
    model = torch.nn.Module()
    for name in names:
        holder = model
        for part in name.split(".")[:-1]:
            if not hasattr(holder, part):
                holder.add_module(part, torch.nn.Module())
            holder = getattr(holder, part)
        holder.weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = {"learning_rate": 1e-3, "embedding_learning_rate": 1e-4}
    lora = {"target_modules": ["lm_head"], "b_learning_rate_ratio": 2.0}
    factors = rate_factors(model, TrainingSpec.parse({"base_model": "m", "lora": lora, "optimizer": optimizer}))
    assert [factors.get(model.get_parameter(name), 1.0) for name in names] == pytest.approx([0.1, 0.1, 0.2, 1.0])
    model.get_parameter(names[0]).requires_grad_(False)
    frozen = rate_factors(model, TrainingSpec.parse({"base_model": "m", "lora": lora, "optimizer": optimizer}))
    assert model.get_parameter(names[0]) not in frozen
