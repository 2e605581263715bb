"""Training on preferences: pairs to gradients, for the loop that supervised runs take their steps by.

Owns reading datasets of pairs and how pairs become micro-batches. The loss of a pair is `dpo`'s, which is TRL's; the decoder's layers are
the engine's own (`layers`) where they take the model.

A dataset folder's shards hold each pair twice over: `chosen_input_ids`, `chosen_label_mask`, `chosen_row_offsets`, and the same with
`rejected_`. Making them is dataprep's.

Shapes: R rows of a micro-batch, its chosen rows first and as many rejected ones after; T tokens of its longest row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import structlog
import torch

from finery_common.errors import InvalidArgumentError
from finery_common.spec import MethodType, TrainingSpec
from finery_trainer.engine.architecture import base_of
from finery_trainer.engine.data import IntArray, MaskedRow, Samples, TokenDataset
from finery_trainer.engine.determinism import deterministic_operations
from finery_trainer.engine.generic import check_quantization
from finery_trainer.engine.layers import bind_layers
from finery_trainer.engine.limits import ModelLimits
from finery_trainer.engine.loop import OnCheckpoint, OnStep, Outcome, drive
from finery_trainer.engine.loss_scale import loss_scale_of
from finery_trainer.engine.optim import Stepper, build_flat_optimizer, rate_factors
from finery_trainer.engine.stack import unsupported
from finery_trainer.engine.trained import flatten

if TYPE_CHECKING:
    from peft import PeftModel

log = structlog.get_logger(__name__)

Pair = tuple[MaskedRow, MaskedRow]
"""A chosen and a rejected row."""


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

    def training_row(self, index: int) -> Pair:
        """One pair."""
        return self.chosen.row(index), self.rejected.row(index)


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
        passes = PreferencePasses(model, spec)
        return drive(model, data, spec, passes, on_step, validation=validation, on_checkpoint=on_checkpoint, resume_from=resume_from)


class PreferencePasses:
    """Passes over pairs, padded micro-batches of `spec.batch`; see `passes.Passes`."""

    def __init__(self, model: PeftModel, spec: TrainingSpec) -> None:
        from finery_trainer.engine.dpo import pair_loss

        self._model, self._spec = model, spec
        self._loss = pair_loss(model, spec)
        self._loss_scale = loss_scale_of(base_of(model).dtype, model.device)

    def stepper(self, num_steps: int) -> Stepper:
        """The optimizer of the adapter."""
        groups = [flatten([parameter for parameter in self._model.parameters() if parameter.requires_grad])]
        factors = rate_factors(self._model, self._spec)
        stepper = build_flat_optimizer(self._spec.optimizer, groups, num_steps, factors=factors, loss_scale=self._loss_scale)
        _bind(self._model)
        return stepper

    def prepare(self, pairs: Sequence[Pair]) -> None:
        """Nothing to get ready."""

    def gradients(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Adds the gradients of the mean loss over `pairs`, and answers it: float32, 0-dim, on the device."""
        losses: list[torch.Tensor] = []
        for loss in self._losses(pairs):
            (loss if self._loss_scale is None else loss * self._loss_scale.value).backward()
            losses.append(loss.detach().float())
        return torch.stack(losses).sum()

    def mean_loss(self, data: Samples[Pair]) -> float:
        """The mean loss over all pairs of `data`, without dropout."""
        self._model.eval()
        with torch.no_grad():
            pairs = [data.training_row(pair) for pair in range(data.num_rows)]
            loss = math.fsum(part.item() for part in self._losses(pairs))
        self._model.train()
        return loss

    def refresh(self) -> None:
        """Trained values are read where they stand."""

    def _losses(self, pairs: Sequence[Pair]) -> Iterator[torch.Tensor]:
        """The losses of the micro-batches that `pairs` make; their sum is the mean over `pairs`."""
        for part in micro_batches(pairs, size=self._spec.batch.micro_batch_size):
            inputs = {name: tensor.to(self._model.device) for name, tensor in padded(part).items()}
            with _precision(self._model):
                loss = self._loss.of(inputs)
            yield loss * (len(part) / len(pairs))


def padded(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """The pairs padded on the right: int64 `input_ids`, `attention_mask` and `completion_mask`, each [R, T]."""
    rows = [*(chosen for chosen, _ in pairs), *(rejected for _, rejected in pairs)]
    batch_3RT = np.zeros((3, len(rows), max(len(ids) for ids, _ in rows)), dtype=np.int64)
    for index, (ids, mask) in enumerate(rows):
        batch_3RT[0, index, : len(ids)] = ids
        batch_3RT[1, index, : len(ids)] = 1
        batch_3RT[2, index, : len(ids)] = mask
    names = ("input_ids", "attention_mask", "completion_mask")
    return {name: torch.from_numpy(part) for name, part in zip(names, batch_3RT, strict=True)}


def micro_batches(pairs: Sequence[Pair], *, size: int) -> Iterator[list[Pair]]:
    """`pairs` in lists of `size`, neighbours in length together so that little is padding."""
    longest = [max(len(ids) for ids, _ in pair) for pair in pairs]
    by_length = sorted(range(len(pairs)), key=lambda index: -longest[index])
    for start in range(0, len(by_length), size):
        yield [pairs[index] for index in by_length[start : start + size]]


def _bind(model: PeftModel) -> None:
    """Lets the passes of policy and reference run through the engine's own layers, where those take the model as supervised runs do."""
    if (reason := unsupported(model) or bind_layers(model)) is not None:
        check_quantization(model)
        log.info("training by transformers' own modules", reason=reason)


def _precision(model: PeftModel) -> contextlib.AbstractContextManager[object]:
    """Adapters are float32 even on 16-bit weights; autocast makes their products 16-bit, as the rest."""
    dtype = base_of(model).dtype
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(model.device.type, dtype=dtype)
