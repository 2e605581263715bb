"""Finery's engine as the benchmarks drive it: the spec that a workload means, what the engine estimates for it, and passes planned for
each workload on one loaded model."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import GIB
from benchmarks.peer_engines import LEARNING_RATE, RANK
from benchmarks.workloads import DETERMINISTIC, MAX_SHORT_TOKENS, MEAN_SHORT_TOKENS, PACKED_TOKENS, IntArray, Workload
from finery_common.spec import MemorySpec, TrainingSpec
from finery_trainer.engine.packing import IGNORE, Row, pack, padded_tokens
from finery_trainer.engine.passes import RESERVE_BYTES
from finery_trainer.engine.planner import Plan

CONTEXT_HOST_GIB = 80
"""Of pinned memory, in the search for the longest context."""
_PROBED_LAYERS = 4


class FineryEngine:
    """The model is loaded once; each workload gets passes and an optimizer of its own, planned for its shape and memory."""

    name = "finery"

    def __init__(self, workload: Workload, model_dir: Path) -> None:
        self.model_dir = model_dir
        # Where the embedding trains, its gradient at the end of a pass may take most.
        self.probes_contexts = workload.method != "fft"
        self._passes_of = importlib.import_module("finery_trainer.engine.passes")
        self._optimizer_of = importlib.import_module("finery_trainer.engine.flat_adamw")
        self._workload, self._spec = workload, spec_of(workload)
        self._model = load(workload, model_dir)
        self._passes: Any = None
        self._optimizer: Any = None
        self._num_steps = 0

    def prepare(self, workload: Workload) -> None:
        """Plans memory and makes the optimizer for `workload`."""
        self.release()
        self._workload, self._spec = workload, spec_of(workload)
        if not torch.cuda.is_available():
            # Limits are of a GPU's memory.
            self._spec = self._spec.model_copy(update={"memory": MemorySpec()})
        self._passes = self._passes_of.PackedPasses(self._model, self._spec, **rows_of(workload))
        self._optimizer = self._optimizer_of.FlatAdamW(self._passes.stack.groups, self._spec.optimizer)
        self._passes.plan_memory()
        self._num_steps = 0

    def step(self, rows: Sequence[IntArray]) -> torch.Tensor:
        """One step on `rows` of any lengths; every token but a row's first is a label. Of a context, as much of it as has its peak."""
        labelled = [(row, np.append(row[1:], IGNORE)) for row in rows]
        if self._workload.kind == "context" and self.probes_contexts:
            return self._probe(labelled)
        self._num_steps += 1
        loss = self._passes.gradients(labelled)
        _, coefficient = self._optimizer.clip_coefficient(self._spec.optimizer.max_grad_norm)
        self._optimizer.step(learning_rate=LEARNING_RATE, step=self._num_steps, clip_coef=coefficient)
        self._optimizer.zero_grad()
        self._passes.refresh()
        return loss

    def _probe(self, rows: Sequence[Row]) -> torch.Tensor:
        """The forward pass, the head, and the backward passes that the peak is in. The optimizer comes later and works in place."""
        stack = self._passes.stack
        batch = pack(rows, token_multiple=padded_tokens(sum(len(ids) for ids, _ in rows)), label_multiple=128).to(stack.device)
        return stack.forward_backward(batch, num_labels=batch.num_labels, backward_layers=probed_layers(stack.plan))

    def release(self) -> None:
        """Drops buffers, graphs and optimizer states."""
        self._passes = self._optimizer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load(workload: Workload, model_dir: Path) -> Any:
    """The model that `workload` trains, on the first GPU where there is one."""
    return importlib.import_module("finery_trainer.engine").load(spec_of(workload), model_dir)


def probed_layers(plan: Plan) -> frozenset[int]:
    """The layers of which one has the peak of the backward passes by `plan`.

    What a layer's backward pass takes depends on what is kept of it and where, and on what arrives from the host for the layer below;
    beside it lies what the layers below keep on the card, which is less the lower it is. So of layers that are treated alike the topmost
    takes most. The last four are always among the answer.
    """
    num_layers = len(plan.card)
    found: list[int] = []
    for index in reversed(range(num_layers)):
        below = plan.host[index - 1] if index else frozenset[str]()
        is_covered = any(
            plan.card[index] == plan.card[above] and plan.host[index] == plan.host[above] and below <= plan.host[above - 1]
            for above in found
        )
        if not is_covered or index >= num_layers - _PROBED_LAYERS:
            found.append(index)
    return frozenset(found)


def estimate_gib(workload: Workload, model_dir: Path) -> float | None:
    """What the engine says beforehand that a run will allocate at the most: from the spec, `config.json` and what memory there is now.

    A spec knows the longest row only, so there is none for rows of many lengths.
    """
    if workload.kind in ("short", "load"):
        return None
    config = json.loads((model_dir / "config.json").read_text())
    estimated = importlib.import_module("finery_trainer.engine.estimate").estimate(
        spec_of(workload),
        config,
        device_memory_bytes=_free_bytes(),
        host_bytes=importlib.import_module("finery_trainer.engine.passes").host_bytes(spec_of(workload)),
    )
    return round(estimated.total_bytes / GIB, 2)


def _free_bytes() -> int:
    """Of the GPU's memory, what is not somebody else's; 0 where there is no GPU."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def rows_of(workload: Workload) -> dict[str, float]:
    """What the plan is to know of the rows: the longest, the mean, and the tokens of a step."""
    if workload.kind != "short":
        length = workload.sequence_length
        return {"longest_row": length, "mean_row": length, "num_tokens": workload.tokens_per_step}
    row_tokens = PACKED_TOKENS if workload.is_packed else MEAN_SHORT_TOKENS
    return {"longest_row": MAX_SHORT_TOKENS + 1, "mean_row": MEAN_SHORT_TOKENS, "num_tokens": row_tokens * workload.rows_per_step}


def spec_of(workload: Workload) -> TrainingSpec:
    """The spec that trains `workload` as the peers do: r=32, alpha 32, 8-bit AdamW, a constant rate."""
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
                # bitsandbytes' default, and that of TRL's trainer.
                "weight_decay": 0.0 if workload.kind == "short" else 0.01,
            },
            "batch": {"micro_batch_size": workload.batch_size, "gradient_accumulation_steps": workload.accumulation},
            "memory": _memory_of(workload),
            "precision": "bfloat16",
            "deterministic": workload.variant == DETERMINISTIC,
            "gpus": workload.num_gpus or 1,
        }
    )


def _memory_of(workload: Workload) -> dict[str, str | int]:
    """A smaller card does not show in what the GPU says is free: what the engine leaves free of one comes off its budget here."""
    if workload.budget_gib is None:
        return {"budget": "auto"}
    if workload.kind != "context":
        return {"budget": int(workload.budget_gib * GIB)}
    return {"budget": int(workload.budget_gib * GIB) - RESERVE_BYTES, "host_budget_bytes": CONTEXT_HOST_GIB * GIB}
