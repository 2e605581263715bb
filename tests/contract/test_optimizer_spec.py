"""No field of OptimizerSpec is accepted and ignored: changing any one changes the optimizer, its schedule or its clipping."""

from __future__ import annotations

import pytest
import torch

from finery_common.spec import MethodType, OptimizerSpec, OptimizerType, ScheduleType, TrainingSpec
from finery_trainer.engine.optim import build_flat_optimizer, rate_factors
from finery_trainer.engine.trained import flatten

NUM_STEPS = 100
OTHER_VALUES: dict[str, object] = {
    "type": OptimizerType.ADAMW_8BIT,
    "learning_rate": 1e-3,
    "weight_decay": 0.2,
    "beta1": 0.5,
    "beta2": 0.9,
    "epsilon": 1e-3,
    "max_grad_norm": 0.1,
    "schedule": ScheduleType.COSINE,
    "warmup_ratio": 0.5,
    "min_warmup_steps": 20,
    "embedding_learning_rate": 1e-5,
}


class Embedding(torch.nn.Module):
    """A model that is nothing but its input embeddings."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([weight])

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.weights

    def get_output_embeddings(self) -> None:
        """There is no head."""


def behaviour(spec: OptimizerSpec) -> list[float]:
    """Where three steps on fixed gradients lead, and every learning rate of a run."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8).reshape(2, 4))
    factors = rate_factors(Embedding(parameter), TrainingSpec(base_model="m", method=MethodType.FULL, optimizer=spec))
    group = flatten([parameter])
    stepper = build_flat_optimizer(spec, [group], NUM_STEPS, factors=factors)
    for scale in (1.0, -0.3, 2.0):
        group.grad_of(0).copy_(scale * torch.linspace(0.01, 1, 8).reshape(2, 4))
        stepper.apply()
    return [*parameter.detach().flatten().tolist(), *(stepper.schedule.learning_rate(step) for step in range(1, NUM_STEPS + 1))]


def test_the_table_below_has_every_field_with_a_value_that_is_not_the_default():
    assert OTHER_VALUES.keys() == OptimizerSpec.model_fields.keys()
    assert all(value != getattr(OptimizerSpec(), name) for name, value in OTHER_VALUES.items())


@pytest.mark.parametrize("field", sorted(OptimizerSpec.model_fields))
def test_changing_a_field_changes_what_the_optimizer_does(field: str):
    changed = OptimizerSpec.model_validate({field: OTHER_VALUES[field]})
    assert behaviour(changed) != behaviour(OptimizerSpec())
