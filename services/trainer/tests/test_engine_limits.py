"""What a model takes: rows up to its positions, RoPE's scaling included, and ids of its vocabulary, whatever else it sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from finery_common.errors import InvalidArgumentError
from finery_common.spec import TrainingSpec
from finery_trainer import engine
from finery_trainer.engine.data import TokenDataset
from finery_trainer.engine.limits import limits_of
from finery_trainer.engine.loop import Action

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def yarn(**fields) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **fields}


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        (None, 64),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 64),
        (yarn(original_max_position_embeddings=64), 256),
        (yarn(original_max_position_embeddings=16), 64),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.5}, 96),
    ],
)
def test_a_row_may_be_as_long_as_rope_is_scaled_to(rope, wanted):
    from transformers import LlamaConfig

    assert limits_of(LlamaConfig(**SIZES, rope_parameters=rope)).max_tokens == wanted


def test_models_without_positions_have_no_limit():
    from transformers import MambaConfig

    assert limits_of(MambaConfig(vocab_size=64)).max_tokens is None


def spec_of(**fields) -> TrainingSpec:
    return TrainingSpec.parse({"base_model": "tiny", "max_sequence_length": 256, "lora": {"target_modules": ["q_proj"]}, **fields})


def train(base_dir, folder, **fields) -> engine.loop.Outcome:
    model = engine.load(spec_of(**fields), base_dir, device=torch.device("cpu"))
    return engine.loop.train(model, TokenDataset(folder), spec_of(**fields), lambda _: Action.CONTINUE)


def test_a_row_past_the_models_positions_is_refused_unless_rope_is_scaled(tmp_path, write_rows):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = write_rows(tmp_path / "data", [[5] * 8, [5] * 80])
    for name, rope in (("plain", None), ("scaled", yarn(original_max_position_embeddings=64))):
        LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).save_pretrained(tmp_path / name)
    with pytest.raises(InvalidArgumentError, match=r"row 1 has 80 tokens, the model's limit is 64 .*config.json scales RoPE"):
        train(tmp_path / "plain", folder)
    assert train(tmp_path / "scaled", folder).last is not None


def test_a_model_that_sees_images_trains_on_text(tmp_path, write_rows):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = Gemma3TextConfig(**SIZES, head_dim=8)
    images = {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), **images)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    outcome = train(tmp_path / "base", write_rows(tmp_path / "data", [[5, 6, 7, 8], [9, 10, 11]]))
    assert outcome.last is not None
    assert outcome.last.grad_norm > 0
    with pytest.raises(InvalidArgumentError, match="token id 64, wanted ids below 64"):
        train(tmp_path / "base", write_rows(tmp_path / "wrong", [[5, 6, 7, 64]]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input_ids": np.array([1, 2, 3], dtype=np.float32)}, r"input_ids is float32 \(3,\), wanted whole numbers"),
        ({"label_mask": np.array([0, 0.5, 1], dtype=np.float32)}, r"label_mask is float32 \(3,\), wanted whole numbers or booleans"),
        ({"row_offsets": np.array([[0, 3]], dtype=np.int64)}, r"row_offsets is int64 \(1, 2\)"),
        ({"row_offsets": np.array([], dtype=np.int64)}, "do not fit together"),
    ],
)
def test_tensors_of_another_kind_are_named(tmp_path, write_rows, change, text):
    shard = write_rows(tmp_path, [[1, 2, 3]]) / "shard-00000.safetensors"
    save_file(load_file(shard) | change, shard)
    with pytest.raises(InvalidArgumentError, match=text):
        TokenDataset(tmp_path)
