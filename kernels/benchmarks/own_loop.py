"""Fixed workloads through Finery's own training loop, on one GPU or on several of one machine: a dataset on disk, one epoch.

Several GPUs are only driven by that loop, so what they gain is measured against the same loop on one.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.baselines import OURS, Row
from benchmarks.finery_engine import estimate_gib, load, spec_of
from benchmarks.measure import Steps, row_of
from benchmarks.workloads import IntArray, Workload, token_rows
from finery_trainer import engine
from finery_trainer.engine.data import TokenDataset
from finery_trainer.engine.loop import Action, StepReport


class OwnLoop:
    """One loaded model, on the first GPU; the loop's other processes load it anew for each workload."""

    def __init__(self, workload: Workload, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._model = load(workload, model_dir)

    def measured(self, workload: Workload, *, num_steps: tuple[int, int]) -> Row:
        """The row of `workload` by the seconds that the loop itself reports for its steps."""
        assert workload.num_gpus is not None
        gc.collect()
        estimated = estimate_gib(workload, self._model_dir)
        warmup, measured = num_steps
        reports: list[StepReport] = []

        def on_step(report: StepReport) -> Action:
            reports.append(report)
            return Action.CONTINUE

        with tempfile.TemporaryDirectory() as folder:
            rows = [row for step in range(warmup + measured) for row in token_rows(workload, step)]
            training_dir = written(Path(folder) / "rows", rows)
            data, spec = TokenDataset(training_dir), spec_of(workload)
            if workload.num_gpus == 1:
                engine.loop.train(self._model, data, spec, on_step)
            else:
                devices = _devices(workload.num_gpus)
                engine.distributed.train(
                    self._model, data, spec, on_step, base_dir=self._model_dir, training_dir=training_dir, devices=devices
                )
        seconds = [workload.tokens_per_step / report.tokens_per_second for report in reports]
        steps = Steps(seconds[warmup:], [report.loss for report in reports], warmup)
        return replace(row_of(OURS, workload, steps, tokens_per_step=workload.tokens_per_step), estimate_gib=estimated)


def written(folder: Path, rows: Sequence[IntArray]) -> Path:
    """`rows` as a dataset folder, every token a label."""
    from safetensors.numpy import save_file

    folder.mkdir()
    tensors = {
        "input_ids": np.concatenate(rows).astype(np.int32),
        "label_mask": np.ones(sum(map(len, rows)), dtype=np.uint8),
        "row_offsets": np.cumsum([0, *map(len, rows)], dtype=np.int64),
    }
    save_file(tensors, folder / "shard-00000.safetensors")
    return folder


def _devices(number: int) -> list[torch.device]:
    """So many GPUs; where there is none, as many processes of the CPU."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")] * number
    if torch.cuda.device_count() < number:
        raise RuntimeError(f"gpus: got {torch.cuda.device_count()}, wanted {number} for this workload.")
    return [torch.device("cuda", index) for index in range(number)]
