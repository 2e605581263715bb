"""Finery's engine as the benchmarks drive it: the spec that a workload means, and one stack a workload on one loaded model."""

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
from benchmarks.workloads import IntArray, Workload
from finery_common.spec import TrainingSpec
from finery_trainer.engine.packing import IGNORE


class FineryEngine:
    """The model is loaded once; each workload gets a stack of its own, planned for its shape and memory."""

    name = "finery"

    def __init__(self, workload: Workload, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._engine = importlib.import_module("finery_trainer.engine")
        self._stacks = importlib.import_module("finery_trainer.engine.stack")
        self._model = self._engine.load(spec_of(workload), model_dir)
        self._stack: Any = None

    def prepare(self, workload: Workload) -> None:
        """Plans memory and makes buffers for `workload`."""
        self.release()
        self._stack = self._stacks.TrainingStack(self._model, spec_of(workload))

    def step(self, rows: Sequence[IntArray]) -> torch.Tensor | float:
        """One step on `rows` of any lengths; every token but a row's first is a label."""
        return self._stack.step([(row, np.append(row[1:], IGNORE)) for row in rows])

    def release(self) -> None:
        """Drops the stack with its buffers and graphs."""
        self._stack = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
