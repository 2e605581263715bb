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


RATES = {"learning_rate": 1e-3, "embedding_learning_rate": 1e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of families that call embeddings and head by other names, tied and not."""
    import transformers as t

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        "gpt_neox": t.GPTNeoXConfig(**sizes, intermediate_size=32),
        "falcon": t.FalconConfig(**sizes, tie_word_embeddings=False),
        "mamba": t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4),
        "llama": t.LlamaConfig(**sizes, intermediate_size=32),
    }
    for name, config in configs.items():
        t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path_factory.getbasetemp() / name)
    return {name: tmp_path_factory.getbasetemp() / name for name in configs}


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("gpt_neox", {"gpt_neox.embed_in.weight", "lm_head.weight"}),
        ("falcon", {"transformer.word_embeddings.weight", "lm_head.weight"}),
        ("mamba", {"backbone.embeddings.weight"}),
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
    ],
)
def test_embeddings_and_head_have_their_own_rate_whatever_the_family_calls_them(folders, family, ends):
    factors = factors_of(folders[family], method="full", optimizer=RATES)
    assert {name for name, factor in factors.items() if factor == pytest.approx(0.1)} == ends
    assert {factor for name, factor in factors.items() if name not in ends} == {1.0}


def test_an_adapter_of_the_head_follows_its_rate_and_b_both(folders):
    lora = {"target_modules": ["lm_head", "q_proj"], "b_learning_rate_ratio": 2.0}
    factors = factors_of(folders["llama"], lora=lora, optimizer=RATES)
    of_head = {name.split(".")[-3]: factor for name, factor in factors.items() if "lm_head" in name}
    assert of_head == {"lora_A": pytest.approx(0.1), "lora_B": pytest.approx(0.2)}
    assert {factor for name, factor in factors.items() if "q_proj" in name} == {1.0, 2.0}
    assert len(factors) == 4, "frozen embeddings have no rate"
