"""The optimizer with its schedule and clipping: everything that `OptimizerSpec` says, in one object.

The learning rate is a function of the step alone, so that a checkpoint needs the step and nothing else of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from finery_common.errors import FailedPreconditionError
from finery_common.spec import OptimizerSpec, OptimizerType, ScheduleType


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


@dataclass
class Stepper:
    """An optimizer, its schedule and its clipping, driven together. `step` counts the steps done."""

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    max_grad_norm: float
    step: int = 0

    def apply(self) -> float:
        """One optimizer step with the gradients at hand, which it then drops; answers their L2 norm before clipping.

        Raises FailedPreconditionError (code `non_finite_loss`) where that norm is not finite; the weights are then unchanged.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise non_finite("gradient norm", grad_norm, step=self.step + 1)
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    @property
    def learning_rate(self) -> float:
        """Of the last step done."""
        return self.schedule.learning_rate(self.step)


def build_optimizer(spec: OptimizerSpec, params: Iterable[torch.nn.Parameter], num_steps: int) -> Stepper:
    """The optimizer over `params` for a run of `num_steps`. Matrices decay, vectors (biases) do not.

    Raises FailedPreconditionError where `adamw_8bit` is asked for without a GPU or without bitsandbytes.
    """
    assert num_steps >= 1
    trainable = [p for p in params if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = _optimizer_class(spec.type, on_gpu=bool(trainable) and trainable[0].is_cuda)
    optimizer = kind(
        [group for group in groups if group["params"]], lr=spec.learning_rate, betas=(spec.beta1, spec.beta2), eps=spec.epsilon
    )
    num_warmup_steps = min(num_steps, max(spec.min_warmup_steps, math.ceil(spec.warmup_ratio * num_steps)))
    return Stepper(optimizer, Schedule(spec.schedule, spec.learning_rate, num_steps, num_warmup_steps), spec.max_grad_norm)


def non_finite(what: str, value: float, *, step: int) -> FailedPreconditionError:
    """The error of a run that diverged."""
    return FailedPreconditionError(
        f"The {what} became {value} at step {step}: training diverged. Lower optimizer.learning_rate, or lengthen the warm-up.",
        code="non_finite_loss",
    )


def _optimizer_class(kind: OptimizerType, *, on_gpu: bool) -> Callable[..., torch.optim.Optimizer]:
    if kind is OptimizerType.ADAMW or (kind is OptimizerType.AUTO and not on_gpu):
        return torch.optim.AdamW
    if not on_gpu:
        raise FailedPreconditionError(
            "optimizer.type: got adamw_8bit on a machine without a GPU; use adamw or auto.", param="optimizer.type"
        )
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # on GPU machines only
    except ImportError as error:
        raise FailedPreconditionError(
            f"optimizer.type {kind.value} needs the package bitsandbytes on a GPU; install it or use adamw.", param="optimizer.type"
        ) from error
    return AdamW8bit
