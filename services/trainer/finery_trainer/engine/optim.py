"""The optimizer with its schedule and clipping: everything that `OptimizerSpec` says, in one object.

The learning rate is a function of the step alone, so that a checkpoint needs the step and nothing else of the schedule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from finery_common.errors import FailedPreconditionError
from finery_common.spec import OptimizerSpec, ScheduleType, TrainingSpec
from finery_trainer.engine.architecture import base_of
from finery_trainer.engine.flat_adamw import FlatAdamW
from finery_trainer.engine.loss_scale import LossScale
from finery_trainer.engine.trained import FlatGroup

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_LORA_B = re.compile(r"\blora_(embedding_)?B\b")


@dataclass(frozen=True)
class Schedule:
    """Learning rates of a run. Steps count from 1."""

    type: ScheduleType
    peak: float
    num_steps: int
    num_warmup_steps: int

    def learning_rate(self, step: int) -> float:
        """Rises over the warm-up steps to the peak at the step after them; linear and cosine then fall to 0, due after the last step."""
        if step <= self.num_warmup_steps:
            return self.peak * step / (self.num_warmup_steps + 1)
        if self.type is ScheduleType.CONSTANT:
            return self.peak
        done = min(1.0, (step - 1 - self.num_warmup_steps) / (self.num_steps - self.num_warmup_steps))
        return self.peak * (1 - done if self.type is ScheduleType.LINEAR else (1 + math.cos(math.pi * done)) / 2)


State = tuple[dict[str, torch.Tensor], dict[str, float]]
"""Tensors and numbers by name."""


class Optimizer(Protocol):
    """What a step does to the trained parameters."""

    def clip_coefficient(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(L2 norm of all gradients, what they must be multiplied by to have at most `max_norm`)."""
        ...

    def step(self, *, learning_rate: float, step: int, clip_coef: torch.Tensor) -> None:
        """Step number `step`, from 1, with the gradients times `clip_coef`."""
        ...

    def zero_grad(self) -> None:
        """Drops the gradients."""
        ...

    def state(self) -> State:
        """What a resumed run needs, by names that depend on the model alone."""
        ...

    def load_state(self, state: State) -> None:
        """Takes over what `state` of the same model and spec has answered."""
        ...


@dataclass
class Stepper:
    """An optimizer, its schedule and its clipping, driven together. `step` counts the steps done."""

    optimizer: Optimizer
    schedule: Schedule
    max_grad_norm: float
    step: int = 0
    loss_scale: LossScale | None = None
    """By which whoever computes gradients multiplies the loss."""

    def apply(self) -> float | None:
        """One optimizer step with the gradients at hand, which it then drops; answers their L2 norm before clipping.

        None, and no step, where they overflowed and `loss_scale` was lowered for it: they are to be computed again. Raises
        FailedPreconditionError (code `non_finite_loss`) where the norm is not finite otherwise; the weights are then unchanged.
        """
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        norm, clip_coef = self.optimizer.clip_coefficient(self.max_grad_norm * scale)
        grad_norm = float(norm) / scale
        if not math.isfinite(grad_norm):
            if self.loss_scale is None or not self.loss_scale.lower():
                raise non_finite("gradient norm", grad_norm, step=self.step + 1)
            self.optimizer.zero_grad()
            return None
        self.step += 1
        self.optimizer.step(learning_rate=self.learning_rate, step=self.step, clip_coef=clip_coef / scale)
        self.optimizer.zero_grad()
        if self.loss_scale is not None:
            self.loss_scale.stepped()
        return grad_norm

    def state(self) -> State:
        """What a resumed run needs besides the number of steps."""
        tensors, numbers = self.optimizer.state()
        return tensors, numbers | ({} if self.loss_scale is None else self.loss_scale.state())

    def load_state(self, state: State) -> None:
        """Takes over what `state` of the same model and spec has answered. Raises KeyError for one of another precision."""
        self.optimizer.load_state(state)
        if self.loss_scale is not None:
            self.loss_scale.load_state(state[1])

    @property
    def learning_rate(self) -> float:
        """Of the last step done."""
        return self.schedule.learning_rate(self.step)


def build_flat_optimizer(
    spec: OptimizerSpec,
    groups: Sequence[FlatGroup],
    num_steps: int,
    *,
    factors: Mapping[torch.nn.Parameter, float] | None = None,
    loss_scale: LossScale | None = None,
) -> Stepper:
    """The optimizer of `groups` for a run of `num_steps`. Matrices decay, vectors (biases) do not.

    `factors` (see `rate_factors`) multiply the learning rate of the parameters they name; gradients come multiplied by `loss_scale`.
    """
    optimizer = FlatAdamW(groups, spec, factors=factors)
    return Stepper(optimizer, _schedule(spec, num_steps), spec.max_grad_norm, loss_scale=loss_scale)


def _schedule(spec: OptimizerSpec, num_steps: int) -> Schedule:
    assert num_steps >= 1
    num_warmup_steps = min(num_steps, max(spec.min_warmup_steps, math.ceil(spec.warmup_ratio * num_steps)))
    return Schedule(spec.schedule, spec.learning_rate, num_steps, num_warmup_steps)


def rate_factors(model: PeftModel | PreTrainedModel, spec: TrainingSpec) -> dict[torch.nn.Parameter, float]:
    """What the learning rate of some trained parameters of `model` is multiplied by: embeddings and head, and LoRA's B."""
    optimizer, factors = spec.optimizer, dict[torch.nn.Parameter, float]()
    ends = set(_ends_of(base_of(model)))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = spec.lora.b_learning_rate_ratio if _LORA_B.search(name) else 1.0
        if optimizer.embedding_learning_rate is not None and parameter in ends:
            factor *= optimizer.embedding_learning_rate / optimizer.learning_rate
        if factor != 1.0:
            factors[parameter] = factor
    return factors


def _ends_of(base: PreTrainedModel) -> Iterator[torch.nn.Parameter]:
    """Parameters of the input embeddings and of the head, whatever the family calls them; adapters on them are among these."""
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if isinstance(module, torch.nn.Module):
            yield from module.parameters()


def non_finite(what: str, value: float, *, step: int) -> FailedPreconditionError:
    """The error of a run that diverged."""
    return FailedPreconditionError(
        f"The {what} became {value} at step {step}: training diverged. Lower optimizer.learning_rate, or lengthen the warm-up.",
        code="non_finite_loss",
    )
