"""Training on preferences: pairs to gradients to steps, with the reports, pauses and checkpoints of the supervised loop.

Owns reading datasets of pairs and the order of things. The loss of a pair is `dpo`'s, which is TRL's; the decoder's layers are the engine's
own (`layers`) where they take the model.

A dataset folder's shards hold each pair twice over: `chosen_input_ids`, `chosen_label_mask`, `chosen_row_offsets`, and the same with
`rejected_`. Making them is dataprep's.

Shapes: R rows of a micro-batch, its chosen rows first and as many rejected ones after; T tokens of its longest row.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import structlog
import torch

from finery_common.errors import DataLossError, InvalidArgumentError
from finery_common.spec import MethodType, TrainingSpec
from finery_trainer.engine import checkpoint
from finery_trainer.engine.data import IntArray, TokenDataset, epoch_order
from finery_trainer.engine.determinism import deterministic_operations
from finery_trainer.engine.generic import check_quantization
from finery_trainer.engine.layers import bind_layers
from finery_trainer.engine.limits import ModelLimits, limits_of
from finery_trainer.engine.loop import Action, OnCheckpoint, OnStep, Outcome, StepReport, memory_bytes, steps_of
from finery_trainer.engine.optim import Stepper, build_flat_optimizer, non_finite, rate_factors
from finery_trainer.engine.stack import unsupported
from finery_trainer.engine.trained import flatten

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig

log = structlog.get_logger(__name__)


class PreferenceDataset:
    """The pairs of a dataset folder, memory-mapped.

    Raises InvalidArgumentError (code `invalid_dataset`) as TokenDataset does, and where a pair lacks one of its rows.
    """

    def __init__(self, folder: Path) -> None:
        self.chosen, self.rejected = (TokenDataset(folder, prefix=prefix) for prefix in ("chosen_", "rejected_"))
        if self.chosen.num_rows != self.rejected.num_rows:
            raise InvalidArgumentError(
                f"The dataset in {folder.name} has {self.chosen.num_rows} chosen and {self.rejected.num_rows} rejected rows, "
                "wanted as many of both; prepare it again.",
                code="invalid_dataset",
            )

    @property
    def num_rows(self) -> int:
        """Pairs."""
        return self.chosen.num_rows

    @property
    def row_lengths(self) -> IntArray:
        """Tokens of each pair."""
        return self.chosen.row_lengths + self.rejected.row_lengths

    def check(self, limits: ModelLimits, *, max_sequence_length: int) -> None:
        """See TokenDataset."""
        self.chosen.check(limits, max_sequence_length=max_sequence_length)
        self.rejected.check(limits, max_sequence_length=max_sequence_length)

    def batch(self, pairs: Sequence[int]) -> dict[str, torch.Tensor]:
        """The given pairs padded on the right: int64 `input_ids`, `attention_mask` and `completion_mask`, each [R, T]."""
        rows = [*(self.chosen.row(pair) for pair in pairs), *(self.rejected.row(pair) for pair in pairs)]
        batch_3RT = np.zeros((3, len(rows), max(len(ids) for ids, _ in rows)), dtype=np.int64)
        for index, (ids, mask) in enumerate(rows):
            batch_3RT[0, index, : len(ids)] = ids
            batch_3RT[1, index, : len(ids)] = 1
            batch_3RT[2, index, : len(ids)] = mask
        names = ("input_ids", "attention_mask", "completion_mask")
        return {name: torch.from_numpy(part) for name, part in zip(names, batch_3RT, strict=True)}

    def micro_batches(self, pairs: Sequence[int], *, size: int) -> Iterator[list[int]]:
        """`pairs` in lists of `size`, neighbours in length together so that little is padding."""
        lengths = np.maximum(self.chosen.row_lengths, self.rejected.row_lengths)
        by_length = sorted(pairs, key=lambda pair: (-int(lengths[pair]), pair))
        for start in range(0, len(by_length), size):
            yield by_length[start : start + size]


def train(
    model: PeftModel,
    data: PreferenceDataset,
    spec: TrainingSpec,
    on_step: OnStep,
    *,
    validation: PreferenceDataset | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    resume_from: Path | None = None,
) -> Outcome:
    """Trains the adapter of `model` in place on `data` by `spec.dpo` and answers how the run ended.

    Seams and promises are those of `loop.train`; a step's loss is the mean over its pairs, however they are split into micro-batches.
    Raises FailedPreconditionError (`non_finite_loss`) where it diverges, InvalidArgumentError where data do not fit the model.
    """
    assert spec.method is MethodType.DPO
    with deterministic_operations(spec, model.device):
        run = _Run(model, data, spec, validation=validation)
        if resume_from is not None:
            run.resume(resume_from)
        report = None
        while run.stepper.step < run.num_steps:
            report = run.step()
            action = on_step(report)
            if action is Action.CANCEL:
                return Outcome(action, report)
            if on_checkpoint is not None and (action is Action.PAUSE or run.is_checkpoint_due(report)):
                on_checkpoint(report, run.save)
            if action is Action.PAUSE and report.step < run.num_steps:
                return Outcome(action, report)
        return Outcome(Action.CONTINUE, report)


class _Run:
    def __init__(self, model: PeftModel, data: PreferenceDataset, spec: TrainingSpec, *, validation: PreferenceDataset | None) -> None:
        from finery_trainer.engine.dpo import pair_loss

        self._model, self._data, self._spec, self._validation = model, data, spec, validation
        limits = limits_of(cast("PretrainedConfig", model.get_base_model().config))
        for dataset in (data, validation):
            if dataset is not None:
                dataset.check(limits, max_sequence_length=spec.max_sequence_length)
        self._steps_per_epoch, self.num_steps = steps_of(data.num_rows, spec)
        self._loss = pair_loss(model, spec)
        groups = [flatten([parameter for parameter in model.parameters() if parameter.requires_grad])]
        self.stepper: Stepper = build_flat_optimizer(spec.optimizer, groups, self.num_steps, factors=rate_factors(model, spec))
        _bind(model)
        self._num_trained_tokens = 0
        self._order: tuple[int, list[int]] = (-1, [])
        torch.manual_seed(spec.seed)
        model.train()

    def resume(self, folder: Path) -> None:
        cursor = checkpoint.restore(folder, model=self._model, stepper=self.stepper)
        if (cursor.num_steps, cursor.num_rows) != (self.num_steps, self._data.num_rows):
            raise DataLossError(
                f"The checkpoint belongs to a run of {cursor.num_steps} steps over {cursor.num_rows} pairs, "
                f"this one has {self.num_steps} over {self._data.num_rows}; start the job anew."
            )
        self._num_trained_tokens = cursor.num_trained_tokens

    def save(self, folder: Path) -> None:
        cursor = checkpoint.Cursor(self.stepper.step, self.num_steps, self._num_trained_tokens, self._data.num_rows)
        checkpoint.save(folder, model=self._model, stepper=self.stepper, cursor=cursor)

    def is_checkpoint_due(self, report: StepReport) -> bool:
        interval = self._spec.checkpoint.interval_steps
        return report.is_epoch_end or (interval is not None and report.step % interval == 0)

    def step(self) -> StepReport:
        started_s = time.perf_counter()
        pairs = self._pairs(self.stepper.step)
        loss = 0.0
        for part in self._losses(self._data, pairs):
            part.backward()
            loss += part.item()
        if not math.isfinite(loss):
            raise non_finite("loss", loss, step=self.stepper.step + 1)
        grad_norm = self.stepper.apply()
        num_tokens = int(self._data.row_lengths[pairs].sum())
        self._num_trained_tokens += num_tokens
        return self._report(loss, grad_norm, tokens_per_second=num_tokens / (time.perf_counter() - started_s))

    def _losses(self, data: PreferenceDataset, pairs: Sequence[int]) -> Iterator[torch.Tensor]:
        """The losses of the micro-batches that `pairs` make; their sum is the mean over `pairs`."""
        for part in data.micro_batches(pairs, size=self._spec.batch.micro_batch_size):
            inputs = {name: tensor.to(self._model.device) for name, tensor in data.batch(part).items()}
            with _precision(self._model):
                loss = self._loss.of(inputs)
            yield loss * (len(part) / len(pairs))

    def _validation_loss(self, data: PreferenceDataset) -> float:
        self._model.eval()
        with torch.no_grad():
            loss = math.fsum(part.item() for part in self._losses(data, range(data.num_rows)))
        self._model.train()
        return loss

    def _report(self, loss: float, grad_norm: float, *, tokens_per_second: float) -> StepReport:
        step = self.stepper.step
        is_epoch_end = step % self._steps_per_epoch == 0 or step == self.num_steps
        is_measured = is_epoch_end and self._validation is not None
        return StepReport(
            step=step,
            num_steps=self.num_steps,
            epoch=step / self._steps_per_epoch,
            loss=loss,
            learning_rate=self.stepper.learning_rate,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_second,
            num_trained_tokens=self._num_trained_tokens,
            memory_bytes=memory_bytes(self._model.device),
            validation_loss=self._validation_loss(cast("PreferenceDataset", self._validation)) if is_measured else None,
            is_epoch_end=is_epoch_end,
        )

    def _pairs(self, step: int) -> list[int]:
        """The pairs of the step after `step` steps."""
        epoch, within = divmod(step, self._steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(self._data.num_rows, seed=self._spec.seed, epoch=epoch)
        size = self._spec.batch.micro_batch_size * self._spec.batch.gradient_accumulation_steps
        return self._order[1][within * size : (within + 1) * size]


def _bind(model: PeftModel) -> None:
    """Lets the passes of policy and reference run through the engine's own layers, where those take the model as supervised runs do."""
    if (reason := unsupported(model) or bind_layers(model)) is not None:
        check_quantization(model)
        log.info("training by transformers' own modules", reason=reason)


def _precision(model: PeftModel) -> contextlib.AbstractContextManager[object]:
    """Adapters are float32 even on bfloat16 weights; autocast makes their products bfloat16, as the rest."""
    if model.get_base_model().dtype is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=torch.bfloat16)
