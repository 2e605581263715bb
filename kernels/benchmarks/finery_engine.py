"""Finery's engine as the benchmarks drive it: the spec that a workload means, and passes planned for each workload on one loaded model."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import GIB
from benchmarks.peer_engines import LEARNING_RATE, RANK
from benchmarks.workloads import MAX_SHORT_TOKENS, MEAN_SHORT_TOKENS, PACKED_TOKENS, IntArray, Workload
from finery_common.spec import TrainingSpec
from finery_trainer.engine.packing import IGNORE


class FineryEngine:
    """The model is loaded once; each workload gets passes and an optimizer of its own, planned for its shape and memory."""

    name = "finery"

    def __init__(self, workload: Workload, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._passes_of = importlib.import_module("finery_trainer.engine.passes")
        self._optimizer_of = importlib.import_module("finery_trainer.engine.flat_adamw")
        self._spec = spec_of(workload)
        self._model = importlib.import_module("finery_trainer.engine").load(self._spec, model_dir)
        self._passes: Any = None
        self._optimizer: Any = None
        self._num_steps = 0

    def prepare(self, workload: Workload) -> None:
        """Plans memory and makes the optimizer for `workload`."""
        self.release()
        self._spec = spec_of(workload)
        self._passes = self._passes_of.PackedPasses(self._model, self._spec, **rows_of(workload))
        self._optimizer = self._optimizer_of.FlatAdamW(self._passes.stack.groups, self._spec.optimizer)
        self._passes.plan_memory()
        self._num_steps = 0

    def step(self, rows: Sequence[IntArray]) -> torch.Tensor:
        """One step on `rows` of any lengths; every token but a row's first is a label."""
        self._num_steps += 1
        loss = self._passes.gradients([(row, np.append(row[1:], IGNORE)) for row in rows])
        _, coefficient = self._optimizer.clip_coefficient(self._spec.optimizer.max_grad_norm)
        self._optimizer.step(learning_rate=LEARNING_RATE, step=self._num_steps, clip_coef=coefficient)
        self._optimizer.zero_grad()
        self._passes.refresh()
        return loss

    def release(self) -> None:
        """Drops buffers, graphs and optimizer states."""
        self._passes = self._optimizer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def rows_of(workload: Workload) -> dict[str, float]:
    """What the plan is to know of the rows: the longest, the mean, and the tokens of a step."""
    if workload.kind != "short":
        length = workload.sequence_length
        return {"longest_row": length, "mean_row": length, "num_tokens": workload.tokens_per_step}
    row_tokens = PACKED_TOKENS if workload.is_packed else MEAN_SHORT_TOKENS
    return {"longest_row": MAX_SHORT_TOKENS + 1, "mean_row": MEAN_SHORT_TOKENS, "num_tokens": row_tokens * workload.rows_per_step}


def spec_of(workload: Workload) -> TrainingSpec:
    """The spec that trains `workload` as the peers do: r=32, alpha 32, 8-bit AdamW, a constant rate."""
    budget_gib = workload.budget_gib
    return TrainingSpec.parse(
        {
            "base_model": "benchmark",
            "method": "full" if workload.method == "fft" else "lora",
            "quantization": "nf4" if workload.method == "qlora" else "none",
            "max_sequence_length": workload.sequence_length,
            **({} if workload.method == "fft" else {"lora": {"rank": RANK, "alpha": float(RANK)}}),
            "optimizer": {
                "type": "adamw_8bit",
                "learning_rate": LEARNING_RATE,
                "schedule": "constant",
                "warmup_ratio": 0,
                "min_warmup_steps": 0,
            },
            "batch": {"micro_batch_size": workload.batch_size, "gradient_accumulation_steps": workload.accumulation},
            "memory": {"budget": "auto" if budget_gib is None else int(budget_gib * GIB)},
            "precision": "bfloat16",
            "deterministic": False,
        }
    )
