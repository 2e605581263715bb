"""Whole models as Hugging Face's folder, which is what transformers, vLLM and the catalogue read: the result of method full.

Owns what goes into the folder. Weights are written by transformers, under the names that the family's checkpoints have, tied ones once; the
tokenizer's files, the chat template and the settings of `generate` are the base model's, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 5_000_000_000
"""Most bytes of a file of weights; S3 stores take 5 GiB in one piece."""
_GENERATION = "generation_config.json"
_COPIED = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template.json", "chat_template.jinja", _GENERATION, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"),
)


def save(model: PreTrainedModel, folder: Path, *, base_dir: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model`, which was loaded from `base_dir`, into `folder`, which must exist; a GPU's memory does not grow.

    `model.safetensors`, or shards of at most `shard_bytes` with their index: only a tensor that is larger makes a larger one.
    """
    from transformers import GenerationConfig

    base_config = cast("dict[str, object]", json.loads((base_dir / "config.json").read_text()))
    was = model.config.use_cache, model.generation_config
    # `load` turned the cache off. Settings of `generate` are copied below: transformers refuses to write some that it reads.
    model.config.use_cache, model.generation_config = bool(base_config.get("use_cache", True)), GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=_on_host(model), max_shard_size=shard_bytes)
    finally:
        model.config.use_cache, model.generation_config = was
    (folder / _GENERATION).unlink(missing_ok=True)
    for pattern in _COPIED:
        for path in base_dir.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def _on_host(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors by name; tied ones are one tensor still, as transformers wants to see them."""
    known: dict[tuple[object, ...], torch.Tensor] = {}
    tensors = cast("dict[str, torch.Tensor]", model.state_dict())
    keys = {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in tensors.items()}
    for name, key in keys.items():
        if key not in known:
            known[key] = tensors[name].cpu()
    return {name: known[key] for name, key in keys.items()}
