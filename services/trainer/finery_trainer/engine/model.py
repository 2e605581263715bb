"""The model being trained: a local Hugging Face folder in the wanted precision, with LoRA layers in PEFT's names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_common.spec import LoraSpec, Precision, TrainingSpec

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def load(spec: TrainingSpec, base_dir: Path, *, device: torch.device | None = None) -> PeftModel:
    """The base model in `base_dir` with fresh adapters, seeded by `spec.seed`, on `device` (default: the GPU where there is one).

    Raises FailedPreconditionError where the folder holds no causal language model, InvalidArgumentError where a target module is
    not in it.
    """
    from peft import get_peft_model

    device = device or default_device()
    base = _load_base(base_dir, dtype=dtype_of(spec.precision, device))
    base.to(device)  # pyright: ignore[reportArgumentType]  # its decorator hides the signature
    base.config.use_cache = False
    torch.manual_seed(spec.seed)
    model = get_peft_model(base, lora_config(spec.lora, base))
    if device.type == "cuda":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """The element type of weights and arithmetic; auto is bfloat16 on a GPU and float32 on a CPU."""
    if precision is Precision.AUTO:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32


def lora_config(spec: LoraSpec, base: torch.nn.Module) -> LoraConfig:
    """PEFT's configuration for `spec`. Raises InvalidArgumentError for a target module that `base` lacks."""
    from peft import LoraConfig

    linears = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in spec.target_modules:
        if not any(name == target or name.endswith("." + target) for name in linears):
            known = ", ".join(sorted({re.sub(r".*\.", "", name) for name in linears}))
            raise InvalidArgumentError(
                f"lora.target_modules: got {target!r}, which is no linear layer of this model; it has {known}.", param="lora.target_modules"
            )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides by the rank, fractions included
        lora_dropout=spec.dropout,
        bias=spec.bias.value,
        target_modules=list(spec.target_modules),
        use_rslora=spec.use_rslora,
    )


def _load_base(base_dir: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            base_dir, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise FailedPreconditionError(
            f"The base model's folder holds no causal language model with safetensors weights that can be loaded: {error}",
            code="invalid_base_model",
        ) from error
