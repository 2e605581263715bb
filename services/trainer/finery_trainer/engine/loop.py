"""The training loop: samples to gradients to steps, with a report after each step that may pause or cancel the run.

Owns the order of things and the numbers reported. How gradients come about is `passes`'s, where reports and checkpoints go the caller's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import psutil
import torch
import torch.distributed as dist

from finery_common.errors import DataLossError
from finery_common.spec import MethodType, TrainingSpec
from finery_trainer.engine import checkpoint
from finery_trainer.engine.data import Samples, TokenDataset, epoch_order
from finery_trainer.engine.flops import model_flops, peak_flops
from finery_trainer.engine.limits import limits_of
from finery_trainer.engine.optim import Stepper, non_finite
from finery_trainer.engine.packing import Row
from finery_trainer.engine.passes import Passes, passes_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

SampleT = TypeVar("SampleT")
T = TypeVar("T")


class Action(StrEnum):
    """What the run does after a step."""

    CONTINUE = "continue"
    PAUSE = "pause"
    """Save the state, then stop."""
    CANCEL = "cancel"
    """Stop at once."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is the mean over the step's labels."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    num_trained_tokens: int
    memory_bytes: int
    validation_loss: float | None
    is_epoch_end: bool
    data_wait_seconds: float = 0.0
    """Spent on reading rows and packing them; a GPU computes beside a part of it."""
    mfu: float | None = None
    """Model FLOPs utilization (`flops`), from 0 to 1; None on a CPU, an unknown card, a mixture of experts, and for pairs."""
    memory_allocated_bytes: int | None = None
    """VRAM that tensors hold after the step; None on a CPU."""
    memory_reserved_bytes: int | None = None
    """VRAM that torch holds for this process, free parts included; None on a CPU."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: CONTINUE means that all steps are done. `last` is None where not one step ran."""

    action: Action
    last: StepReport | None


OnStep = Callable[[StepReport], Action]
OnCheckpoint = Callable[[StepReport, Callable[[Path], None]], None]
"""Called with the report of the step just done and a function that writes the full state into an existing folder."""


def train(
    model: PeftModel | PreTrainedModel,
    data: TokenDataset,
    spec: TrainingSpec,
    on_step: OnStep,
    *,
    validation: TokenDataset | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    resume_from: Path | None = None,
    passes: Passes[Row] | None = None,
) -> Outcome:
    """Trains `model` in place on `data` and answers how the run ended.

    `on_step` is called after every step and obeyed at once. `on_checkpoint` is called at the end of every epoch, every
    `spec.checkpoint.interval_steps`, at the last step and before a pause takes effect. `resume_from` is a folder that it filled.
    `passes` are made by `passes_of` where none are given.
    On a CPU the run is deterministic, and a resumed one is bit-equal to one never stopped.
    Raises FailedPreconditionError (`non_finite_loss`) where it diverges, InvalidArgumentError where data do not fit the model.
    """
    passes = passes_of(model, spec, data) if passes is None else passes
    return drive(model, data, spec, passes, on_step, validation=validation, on_checkpoint=on_checkpoint, resume_from=resume_from)


def drive(
    model: PeftModel | PreTrainedModel,
    data: Samples[SampleT],
    spec: TrainingSpec,
    passes: Passes[SampleT],
    on_step: OnStep,
    *,
    validation: Samples[SampleT] | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    resume_from: Path | None = None,
) -> Outcome:
    """As `train`, by `passes` over samples of whatever kind they take."""
    run = _Run(model, data, spec, passes, validation=validation)
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


def steps_of(num_rows: int, spec: TrainingSpec) -> tuple[int, int]:
    """(steps of an epoch, steps of the run)."""
    per_epoch = math.ceil(num_rows / (spec.batch.micro_batch_size * spec.batch.gradient_accumulation_steps))
    total = per_epoch * spec.num_epochs
    return per_epoch, total if spec.max_steps is None else min(total, spec.max_steps)


class _Run(Generic[SampleT]):
    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        data: Samples[SampleT],
        spec: TrainingSpec,
        passes: Passes[SampleT],
        *,
        validation: Samples[SampleT] | None,
    ) -> None:
        self._model, self._data, self._spec, self._passes, self._validation = model, data, spec, passes, validation
        limits = limits_of(cast("PretrainedConfig", model.config))
        for dataset in (data, validation):
            if dataset is not None:
                dataset.check(limits, max_sequence_length=spec.max_sequence_length)
        self._steps_per_epoch, self.num_steps = steps_of(data.num_rows, spec)
        self.stepper: Stepper = passes.stepper(self.num_steps)
        self._num_trained_tokens = 0
        self._order: tuple[int, list[int]] = (-1, [])
        self._next: tuple[list[int], list[SampleT]] = ([], [])
        self._data_wait_s = 0.0
        self._device = next(p.device for p in model.parameters() if p.requires_grad)
        # A pair's row lengths are those of both its rows together, which says too little of attention.
        self._flops = None if spec.method is MethodType.DPO else model_flops(model)
        self._peak_flops = peak_flops(self._device)
        torch.manual_seed(spec.seed)
        model.train()

    def resume(self, folder: Path) -> None:
        cursor = checkpoint.restore(folder, model=self._model, stepper=self.stepper)
        self._passes.refresh()
        if (cursor.num_steps, cursor.num_rows) != (self.num_steps, self._data.num_rows):
            raise DataLossError(
                f"The checkpoint belongs to a run of {cursor.num_steps} steps over {cursor.num_rows} rows or pairs, "
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
        self._data_wait_s = 0.0
        rows = self._rows(self.stepper.step)
        lengths = [int(length) for length in self._data.row_lengths[rows]]
        loss, grad_norm = self._stepped(rows)
        while grad_norm is None:
            loss, grad_norm = self._stepped(rows)
        self._passes.refresh()
        self._num_trained_tokens += sum(lengths)
        seconds = time.perf_counter() - started_s
        return self._report(loss, grad_norm, lengths=lengths, seconds=seconds)

    def _stepped(self, rows: list[int]) -> tuple[float, float | None]:
        """(loss, norm of the gradients) of a step; without a norm it was not taken, and is to be computed again (`Stepper.apply`)."""
        samples = self._waiting(lambda: self._read(rows))
        loss_0d = self._passes.gradients(samples)
        self._waiting(self._prepare_next)
        loss = loss_0d.item()
        if not math.isfinite(loss):
            raise non_finite("loss", loss, step=self.stepper.step + 1)
        return loss, self.stepper.apply()

    def _waiting(self, work: Callable[[], T]) -> T:
        started_s = time.perf_counter()
        result = work()
        self._data_wait_s += time.perf_counter() - started_s
        return result

    def _read(self, rows: list[int]) -> list[SampleT]:
        if self._next[0] != rows:
            self._next = rows, [self._data.training_row(row) for row in rows]
        return self._next[1]

    def _prepare_next(self) -> None:
        """The next step's batches, while the device computes this one's gradients."""
        if self.stepper.step + 1 < self.num_steps:
            self._passes.prepare(self._read(self._rows(self.stepper.step + 1)))

    def _report(self, loss: float, grad_norm: float, *, lengths: list[int], seconds: float) -> StepReport:
        step = self.stepper.step
        is_epoch_end = step % self._steps_per_epoch == 0 or step == self.num_steps
        validation_loss = None
        if is_epoch_end and self._validation is not None:
            validation_loss = self._passes.mean_loss(self._validation)
        return StepReport(
            step=step,
            num_steps=self.num_steps,
            epoch=step / self._steps_per_epoch,
            loss=loss,
            learning_rate=self.stepper.learning_rate,
            grad_norm=grad_norm,
            tokens_per_second=sum(lengths) / seconds,
            num_trained_tokens=self._num_trained_tokens,
            memory_bytes=memory_bytes(self._device),
            validation_loss=validation_loss,
            is_epoch_end=is_epoch_end,
            data_wait_seconds=self._data_wait_s,
            mfu=self._mfu(lengths, seconds=seconds),
            memory_allocated_bytes=torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None,
            memory_reserved_bytes=torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else None,
        )

    def _mfu(self, lengths: list[int], *, seconds: float) -> float | None:
        if self._flops is None or self._peak_flops is None:
            return None
        num_gpus = dist.get_world_size() if dist.is_initialized() else 1
        return self._flops.of_rows(lengths) / (seconds * self._peak_flops * num_gpus)

    def _rows(self, step: int) -> list[int]:
        """The rows of the step after `step` steps."""
        epoch, within = divmod(step, self._steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(self._data.num_rows, seed=self._spec.seed, epoch=epoch)
        size = self._spec.batch.micro_batch_size * self._spec.batch.gradient_accumulation_steps
        return self._order[1][within * size : (within + 1) * size]


def memory_bytes(device: torch.device) -> int:
    """Peak of allocated VRAM on a GPU, resident set of this process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
