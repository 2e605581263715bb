"""The peers to measure against, loaded as their own documentation says: transformers with PEFT and bitsandbytes, Liger, Unsloth.

Each gets the settings that its trainers use by default: r=32 on all seven linears, AdamW8bit, gradient checkpointing, bfloat16 (autocast
for the first two, which keep adapters in float32; Unsloth has its own). Nothing here knows Finery's engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import IntArray, Workload

RANK = 32
LEARNING_RATE = 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeerEngine:
    """A peer's model under a plain training loop: forward, backward, AdamW8bit."""

    probes_contexts = False

    def __init__(self, name: str, method: str, model_dir: Path, *, max_sequence_length: int) -> None:
        self.name, self.model_dir = name, model_dir
        self.device = _device()
        self.model = load(name, method, model_dir, max_sequence_length=max_sequence_length)
        optim = importlib.import_module("bitsandbytes.optim")
        self._optimizer = optim.AdamW8bit([p for p in self.model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        self._has_autocast = name != "unsloth" and method != "fft"
        self._batch_size = 1

    def prepare(self, workload: Workload) -> None:
        """Takes the micro-batch size."""
        self._batch_size = workload.batch_size

    def step(self, rows: Sequence[IntArray]) -> torch.Tensor:
        """One step on rows of one length, `batch_size` of them a micro-batch; the mean loss."""
        ids_NBT = torch.from_numpy(np.stack(rows)).to(self.device).split(self._batch_size)
        total = torch.zeros((), device=self.device)
        for ids_BT in ids_NBT:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._has_autocast):
                loss = self.model(input_ids=ids_BT, labels=ids_BT).loss / len(ids_NBT)
            loss.backward()
            total += loss.detach()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def release(self) -> None:
        """Drops gradients that a failed step left."""
        self._optimizer.zero_grad(set_to_none=True)


def load(name: str, method: str, model_dir: Path, *, max_sequence_length: int) -> Any:
    """The model that the peer `name` trains, on the first GPU where there is one."""
    if name == "unsloth":
        return _load_unsloth(model_dir, method, max_sequence_length)
    return _load_transformers(model_dir, method, _device(), with_liger=name == "liger")


def version_of(name: str) -> str:
    """The packages that make the peer `name`, with their versions."""
    packages = {"unsloth": ("unsloth", "unsloth_zoo"), "liger": ("liger_kernel", "peft", "bitsandbytes"), "hf": ("peft", "bitsandbytes")}
    return ", ".join(f"{package} {version(package)}" for package in packages[name])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load_unsloth(model_dir: Path, method: str, max_sequence_length: int) -> Any:
    fast = importlib.import_module("unsloth").FastLanguageModel
    model, _ = fast.from_pretrained(
        str(model_dir),
        max_seq_length=max_sequence_length,
        dtype=torch.bfloat16,
        load_in_4bit=method == "qlora",
        full_finetuning=method == "fft",
        local_files_only=True,
    )
    if method != "fft":
        model = fast.get_peft_model(
            model,
            r=RANK,
            lora_alpha=RANK,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing="unsloth",
            random_state=3407,
            max_seq_length=max_sequence_length,
        )
    fast.for_training(model)
    return model


def _load_transformers(model_dir: Path, method: str, device: torch.device, *, with_liger: bool) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if with_liger:
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
    options: dict[str, Any] = {}
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, device_map={"": device}, attn_implementation="sdpa", local_files_only=True, **options
    )
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method != "fft":
        model = _with_adapters(model)
    return model.train()


def _with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model.enable_input_require_grads()
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, bias="none", target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)
