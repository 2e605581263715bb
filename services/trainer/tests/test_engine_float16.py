"""Training in float16: gradients that need the loss scale, overflows that cost no step, and resumption."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_common.spec import TrainingSpec
from finery_trainer import engine
from finery_trainer.engine import loss_scale
from finery_trainer.engine.data import TokenDataset
from finery_trainer.engine.loop import Action, StepReport
from finery_trainer.engine.loss_scale import LossScale
from finery_trainer.engine.passes import passes_of

CPU = torch.device("cpu")


def spec_of(**fields) -> TrainingSpec:
    defaults = {
        "base_model": "tiny",
        "max_sequence_length": 64,
        "precision": "float16",
        "optimizer": {"learning_rate": 0.01, "min_warmup_steps": 1},
        "batch": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
        "max_steps": 4,
    }
    return TrainingSpec.parse({**defaults, **fields})


# A model whose every layer is the engine's own, and one that trains by its own modules.
PATHS: dict[str, dict[str, Any]] = {"packed": {}, "generic": {"lora": {"use_dora": True}}}


@pytest.fixture
def data(tmp_path, write_rows, tiny_rows) -> TokenDataset:
    return TokenDataset(write_rows(tmp_path / "data", tiny_rows))


def load(spec: TrainingSpec, base_dir) -> Any:
    return engine.load(spec, base_dir, device=CPU)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(spec, base_dir, data, *, stop_after: int | None = None, **seams) -> tuple[Any, list[StepReport]]:
    model, reports = load(spec, base_dir), []

    def on_step(report: StepReport) -> Action:
        reports.append(report)
        return Action.PAUSE if report.step == stop_after else Action.CONTINUE

    engine.loop.train(model, data, spec, on_step, **seams)
    return model, reports


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_float32_within_float16_s_rounding(tiny_base_dir, data, path):
    found: list[dict[str, torch.Tensor]] = []
    for precision in ("float32", "float16"):
        spec = spec_of(precision=precision, **PATHS[path])
        model = load(spec, tiny_base_dir)
        passes = passes_of(model, spec, data)
        stepper = passes.stepper(4)
        loss = passes.gradients([data.training_row(row) for row in range(4)])
        scale = 1.0 if stepper.loss_scale is None else stepper.loss_scale.value
        assert (precision == "float16") == (scale > 1)
        found.append({name: p.grad / scale for name, p in model.named_parameters() if p.requires_grad} | {"loss": loss})
    wanted, ours = found
    assert wanted.keys() == ours.keys()
    for name, tensor in wanted.items():
        # A pass rounds a few dozen times in a row, by 2**-11 each.
        assert (ours[name] - tensor).norm() <= 0.02 * tensor.norm() + 1e-7, name


@pytest.mark.parametrize("path", PATHS)
def test_a_step_that_overflows_is_computed_again_with_half_the_scale(tiny_base_dir, data, monkeypatch, path):
    spec = spec_of(**PATHS[path])
    _, wanted = run(spec, tiny_base_dir, data)
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**40)
    model, reports = run(spec, tiny_base_dir, data)
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert [report.num_trained_tokens for report in reports] == [report.num_trained_tokens for report in wanted]
    for report, other in zip(reports, wanted, strict=True):
        assert report.loss == pytest.approx(other.loss, rel=5e-3)
        assert report.grad_norm == pytest.approx(other.grad_norm, rel=5e-2)
    assert all(tensor.isfinite().all() for tensor in trained(model).values())


@pytest.mark.parametrize("path", PATHS)
def test_a_resumed_run_is_bit_equal_scale_included(tiny_base_dir, data, tmp_path, monkeypatch, path):
    monkeypatch.setattr(loss_scale, "STEPS_TO_RISE", 3)  # So that it rises after the resumption, by steps counted before.
    spec, state = spec_of(**PATHS[path]), tmp_path / "state"
    state.mkdir()
    whole, reports = run(spec, tiny_base_dir, data)
    _, first = run(spec, tiny_base_dir, data, stop_after=2, on_checkpoint=lambda _, save: save(state))
    resumed, rest = run(spec, tiny_base_dir, data, resume_from=state)
    assert [(r.loss, r.grad_norm) for r in [*first, *rest]] == [(r.loss, r.grad_norm) for r in reports]
    for name, weight in trained(whole).items():
        assert torch.equal(weight, trained(resumed)[name]), name


def test_a_loss_that_no_scale_saves_ends_the_run(tiny_base_dir, data):
    spec = spec_of()
    model = load(spec, tiny_base_dir)
    passes = passes_of(model, spec, data)
    stepper = passes.stepper(4)
    scale = stepper.loss_scale
    assert scale is not None
    adapter = next(p for p in model.parameters() if p.requires_grad)
    values: list[float] = []

    def overflow() -> None:
        adapter.grad.fill_(float("inf"))
        assert stepper.apply() is None
        values.append(scale.value)

    while scale.value > loss_scale.LEAST:
        overflow()
    with pytest.raises(FailedPreconditionError, match="gradient norm became") as caught:
        overflow()
    assert caught.value.code == "non_finite_loss"
    assert values == [loss_scale.FIRST / 2**n for n in range(1, len(values) + 1)]
    assert values[-1] == loss_scale.LEAST


def test_the_scale_rises_after_enough_steps_and_no_further_than_the_most():
    scale = LossScale(CPU, value=loss_scale.MOST / 2)
    for _ in range(3 * loss_scale.STEPS_TO_RISE):
        scale.stepped()
    assert scale.value == scale.factor_1.item() == loss_scale.MOST
    assert scale.lower()
    assert scale.value == scale.factor_1.item() == loss_scale.MOST / 2


def test_float16_for_every_weight_is_refused():
    with pytest.raises(InvalidArgumentError, match="got float16 with method full, wanted bfloat16 or float32"):
        spec_of(method="full")
