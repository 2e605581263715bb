"""Adapters as PEFT writes them, which is what vLLM, transformers and TRL read: `adapter_config.json`, `adapter_model.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

if TYPE_CHECKING:
    from peft import PeftModel


def save(model: PeftModel, folder: Path, *, base_model: str) -> None:
    """Writes the adapter of `model` into `folder`, which must exist. `base_model` is the name that its configuration records."""
    from peft import get_peft_model_state_dict

    # "auto" would ask the Hub whether the vocabulary grew.
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    was = config.base_model_name_or_path, config.inference_mode
    config.base_model_name_or_path, config.inference_mode = base_model, True
    config.save_pretrained(str(folder))
    config.base_model_name_or_path, config.inference_mode = was
