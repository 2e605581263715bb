"""Embeddings that stay in host memory: the same bits in every number of a run, and refused where they must be on the GPU."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from finery_common.errors import FailedPreconditionError
from finery_common.spec import TrainingSpec
from finery_trainer.engine.generic import GenericPasses
from finery_trainer.engine.packing import IGNORE, Row
from finery_trainer.engine.passes import PackedPasses

VOCABULARY = 4096
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
NUM_STEPS = 4


def spec_of(*, is_offloaded: bool) -> TrainingSpec:
    return TrainingSpec.parse(
        {
            "base_model": "tiny",
            "max_sequence_length": 64,
            "optimizer": {"learning_rate": 0.01, "min_warmup_steps": 0},
            "memory": {"offload_embeddings": is_offloaded},
            "deterministic": True,
        }
    )


def model_of(family: str = "llama", *, is_tied: bool = False, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    torch.manual_seed(0)
    kinds = {"llama": (LlamaForCausalLM, LlamaConfig), "gemma2": (Gemma2ForCausalLM, Gemma2Config)}
    model, config = kinds[family]
    base = model(config(**SIZES, tie_word_embeddings=is_tied)).to(dtype)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **lora))


def rows_of(seed: int) -> list[Row]:
    """Of the same lengths for every seed."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, VOCABULARY, length) for length in (7, 33, 20)]
    return [(row, np.append(row[1:], IGNORE)) for row in rows]


def run(model: Any, *, is_offloaded: bool) -> tuple[list[float], list[torch.Tensor]]:
    """(losses, trained values) of a few steps."""
    passes = PackedPasses(model, spec_of(is_offloaded=is_offloaded), longest_row=33, mean_row=20.0, num_tokens=60)
    stepper, losses = passes.stepper(NUM_STEPS), list[float]()
    for seed in range(NUM_STEPS):
        losses.append(passes.gradients(rows_of(seed)).item())
        passes.prepare(rows_of(seed + 1))
        stepper.apply()
        passes.refresh()
    losses.append(passes.loss(rows_of(0)).item())
    return losses, [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def check_same(model: Any) -> None:
    losses, weights = run(copy.deepcopy(model), is_offloaded=False)
    offloaded_losses, offloaded_weights = run(model, is_offloaded=True)
    assert losses == offloaded_losses
    assert len(set(losses)) == len(losses)
    assert all(torch.equal(one, other) for one, other in zip(weights, offloaded_weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_run_has_the_same_bits(family: str, dtype: torch.dtype):
    check_same(model_of(family, dtype=dtype))


def test_the_table_is_not_read_in_a_pass():
    model = model_of()
    passes = PackedPasses(model, spec_of(is_offloaded=True), longest_row=33, mean_row=20.0, num_tokens=60)
    rows = rows_of(0)
    passes.prepare(rows)
    model.get_input_embeddings().weight.data.fill_(torch.nan)
    assert passes.gradients(rows).isfinite()


def test_an_embedding_that_is_the_head_too_is_refused():
    with pytest.raises(FailedPreconditionError, match="head is the same matrix") as caught:
        run(model_of(is_tied=True), is_offloaded=True)
    assert caught.value.param == "memory.offload_embeddings"


def test_transformers_own_modules_refuse_it():
    with pytest.raises(FailedPreconditionError, match="transformers' own modules") as caught:
        GenericPasses(model_of(use_dora=True), spec_of(is_offloaded=True))
    assert caught.value.param == "memory.offload_embeddings"


@pytest.mark.gpu
def test_a_run_on_a_gpu_has_the_same_bits_with_and_without_graphs():
    check_same(model_of(dtype=torch.bfloat16).cuda())


@pytest.mark.gpu
def test_the_table_leaves_the_gpu():
    model = model_of(dtype=torch.bfloat16).cuda()
    table = model.get_input_embeddings().weight
    before = torch.cuda.memory_allocated()
    passes = PackedPasses(model, spec_of(is_offloaded=False), longest_row=33, mean_row=20.0, num_tokens=60)
    kept = torch.cuda.memory_allocated() - before
    del passes
    gc.collect()
    passes = PackedPasses(model, spec_of(is_offloaded=True), longest_row=33, mean_row=20.0, num_tokens=60)
    assert table.device.type == "cpu"
    assert passes.stack.device.type == "cuda"
    assert torch.cuda.memory_allocated() - before <= kept - table.nbytes // 2
