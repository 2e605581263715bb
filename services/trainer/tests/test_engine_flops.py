"""The count of a step's arithmetic agrees with torch's own counter, and cards are known by their drivers' names."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finery_trainer.engine.flops import ModelFlops, model_flops, peak_flops, peak_flops_of

LENGTH = 24
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))


def _adapted():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_llama(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    # Otherwise the first layer would need no gradient of what goes into it.
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("make", [_llama, _adapted])
def test_the_count_is_torchs_own_but_for_the_half_of_attention_that_is_masked(make):
    model = make()
    ids = torch.arange(LENGTH)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counted = model_flops(model)
    assert counted is not None
    # Plain attention works on the whole square.
    assert counter.get_total_flops() == counted.per_token * LENGTH + 2 * counted.per_squared_length * LENGTH**2


def test_rows_attend_to_themselves_alone():
    assert ModelFlops(10.0, 2.0).of_rows([3, 4]) == 10 * 7 + 2 * (9 + 16)


def test_a_mixture_of_experts_has_no_count():
    from transformers import MixtralConfig, MixtralForCausalLM

    assert model_flops(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))) is None


@pytest.mark.parametrize(
    ("card", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 989.4 / 7),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250.0),
        ("Quadro P400", None),
    ],
)
def test_a_card_is_known_by_its_name(card, teraflops):
    expected = None if teraflops is None else pytest.approx(teraflops * 1e12)
    assert peak_flops_of(card) == expected


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None
