"""Checkpoints of random weights: speed and memory do not depend on what a model has learnt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 49408,
        "max_position_embeddings": 16384,
    },
}
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make(folder: Path, *, shape: str, tokenizer_dir: Path | None) -> None:
    """Writes a bfloat16 Llama of `shape` to `folder`, made on the GPU where there is one; 8B take 16 GB.

    Raises FileNotFoundError where `tokenizer_dir` holds no tokenizer.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if tokenizer_dir is not None and not (tokenizer_dir / "tokenizer.json").is_file():
        raise FileNotFoundError(f"--tokenizer: {tokenizer_dir} has no tokenizer.json.")
    config = LlamaConfig(
        **SHAPES[shape],
        rms_norm_eps=1e-5,
        rope_parameters=_ROPE,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(3407)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    if tokenizer_dir is not None:
        for path in filter(Path.is_file, (tokenizer_dir / name for name in TOKENIZER_FILES)):
            shutil.copy(path, folder)


def with_positions(model_dir: Path, *, num_positions: int, folder: Path) -> Path:
    """`model_dir` where its configuration allows that many positions; else `folder`, filled with links and a configuration that does."""
    config = json.loads((model_dir / "config.json").read_text())
    if config.get("max_position_embeddings", num_positions) >= num_positions:
        return model_dir
    for path in _others(model_dir.iterdir()):
        (folder / path.name).symlink_to(path.resolve())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": num_positions}))
    return folder


def _others(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.name != "config.json"]
