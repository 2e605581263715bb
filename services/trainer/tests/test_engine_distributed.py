"""Training shared by replicas: two processes on a CPU, over Gloo; with GPUs also over NCCL."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_common.spec import LoraSpec, TrainingSpec
from finery_trainer import engine
from finery_trainer.engine import distributed
from finery_trainer.engine.data import TokenDataset
from finery_trainer.engine.distributed import ReplicaLostError, shares
from finery_trainer.engine.loop import Action, StepReport
from finery_trainer.engine.passes import most_tokens, packed_passes
from finery_trainer.worker import Inputs, _method_of

CPU = torch.device("cpu")
NUM_STEPS = 4


def replicas() -> list[psutil.Process]:
    """Other tests' processes may be there too."""
    return [child for child in psutil.Process().children(recursive=True) if "finery_trainer.engine.replica" in child.cmdline()]


class Case(NamedTuple):
    """Nine rows, eight a step: every second step has one row, and so nothing for the second replica."""

    spec: TrainingSpec
    base_dir: Path
    training_dir: Path

    def model(self):
        return engine.load(self.spec, self.base_dir, device=CPU)

    def train(self, model, on_step, **options):
        places = {"base_dir": self.base_dir, "training_dir": self.training_dir, "devices": [CPU, CPU], **options}
        return distributed.train(model, TokenDataset(self.training_dir), self.spec, on_step, **places)


def spec_of(**fields) -> TrainingSpec:
    batch = {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
    # AdamW divides by gradients of any size; with this epsilon those near 0 do not make weights of their rounding.
    optimizer = {"learning_rate": 0.01, "min_warmup_steps": 1, "epsilon": 1e-3}
    defaults = {"base_model": "tiny", "max_sequence_length": 64, "num_epochs": 2, "checkpoint": {"interval_steps": 1}}
    return TrainingSpec.parse({**defaults, "batch": batch, "optimizer": optimizer, **fields})


@pytest.fixture
def case(tmp_path, tiny_base_dir, tiny_rows, write_rows) -> Case:
    return Case(spec_of(), tiny_base_dir, write_rows(tmp_path / "data", tiny_rows[:9]))


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_rows_go_to_whoever_has_the_fewest_tokens():
    assert shares([5, 1, 9, 4, 3], num_replicas=2) == [[2, 4], [0, 1, 3]]
    assert shares([7], num_replicas=3) == [[0], [], []]
    lengths = np.random.default_rng(0).integers(1, 100, size=64).tolist()
    given = shares(lengths, num_replicas=4)
    assert sorted(index for indices in given for index in indices) == list(range(64))
    loads = [sum(lengths[index] for index in indices) for indices in given]
    assert max(loads) - min(loads) <= max(lengths)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), num_replicas=st.integers(1, 8))
def test_no_replica_is_given_more_tokens_than_are_planned_for(lengths, num_replicas):
    most = most_tokens(lengths, num_replicas=num_replicas)
    given_lengths = [[lengths[index] for index in share] for share in shares(lengths, num_replicas=num_replicas)]
    assert max(map(sum, given_lengths)) <= most
    assert most <= most_tokens([max(lengths)] * len(lengths), num_replicas=num_replicas)
    assert most_tokens([7] * 16, num_replicas=2) == 56


def test_two_replicas_take_the_steps_of_one_and_resume_to_the_bit(case, tmp_path):
    data, alone, together, pieces = TokenDataset(case.training_dir), [], [], []
    model_alone, model, broken, resumed = (case.model() for _ in range(4))
    after: dict[int, dict[str, torch.Tensor]] = {}

    def watch(report: StepReport) -> Action:
        together.append(report)
        after[report.step] = weights_of(model)
        return Action.CONTINUE

    engine.loop.train(model_alone, data, case.spec, lambda report: (alone.append(report), Action.CONTINUE)[1], validation=data)
    outcome = case.train(model, watch, validation=data)
    assert (outcome.action, outcome.last) == (Action.CONTINUE, together[-1])
    assert [report.num_trained_tokens for report in together] == [report.num_trained_tokens for report in alone]
    for field in ("loss", "grad_norm", "validation_loss"):
        ours, wanted = ([getattr(report, field) or 0.0 for report in reports] for reports in (together, alone))
        assert ours == pytest.approx(wanted, rel=1e-5)
    for name, weight in weights_of(model_alone).items():
        torch.testing.assert_close(after[NUM_STEPS][name], weight, rtol=1e-4, atol=1e-6)

    def fail_at_2(report: StepReport) -> Action:
        pieces.append(report)
        if report.step == 2:
            raise KeyError("ours")
        return Action.CONTINUE

    with pytest.raises(KeyError, match="ours"):
        case.train(broken, fail_at_2, on_checkpoint=lambda _, save: save(tmp_path))
    assert not replicas()

    def pause_at_3(report: StepReport) -> Action:
        pieces.append(report)
        return Action.PAUSE if report.step == 3 else Action.CONTINUE

    outcome = case.train(resumed, pause_at_3, resume_from=tmp_path)
    assert (outcome.action, outcome.last) == (Action.PAUSE, pieces[-1])
    assert [(report.step, report.loss) for report in pieces] == [(step, together[step - 1].loss) for step in (1, 2, 2, 3)]
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, after[3][name]), name


def test_memory_is_planned_when_collectives_have_taken_theirs(case, monkeypatch):
    """NCCL takes buffers at the first collective of each kind: 850 MiB, which a plan before it would have given away."""
    calls: list[str] = []

    def noted(place, name):
        call = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, **k: (calls.append(name), call(*a, **k))[1])

    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        noted(torch.distributed, "broadcast")
        noted(torch.distributed, "all_reduce")
        passes = packed_passes(case.model(), case.spec, TokenDataset(case.training_dir))
        noted(passes, "plan_memory")
        distributed.SharedPasses(passes).stepper(NUM_STEPS)
    finally:
        torch.distributed.destroy_process_group()
    assert calls == ["broadcast", "all_reduce", "all_reduce", "plan_memory"]


def test_what_a_replica_raises_ends_the_run(case, tmp_path):
    with pytest.raises(InvalidArgumentError, match="has no rows") as caught:
        case.train(case.model(), lambda _: Action.CONTINUE, training_dir=tmp_path)
    assert "In another replica's process" in caught.value.__notes__[0]
    assert not replicas()


def test_a_replica_s_death_ends_the_run(case):
    reports: list[StepReport] = []

    def kill_the_other(report: StepReport) -> Action:
        reports.append(report)
        (child,) = replicas()
        child.kill()
        return Action.CONTINUE

    with pytest.raises(ReplicaLostError, match=r"on cpu \(replica 1\) was ended by SIGKILL"):
        case.train(case.model(), kill_the_other)
    assert [report.step for report in reports] == [1]
    assert not torch.distributed.is_initialized()


def test_a_worker_refuses_several_gpus_for_a_model_outside_the_families(case):
    # A spec cannot say so; a model may have it of its own accord.
    case = case._replace(spec=spec_of(gpus=2).model_copy(update={"lora": LoraSpec(dropout=0.5)}))
    inputs = Inputs(case.base_dir, "", case.training_dir, validation_dir=None, checkpoint_dir=None)
    with pytest.raises(FailedPreconditionError, match=r"gpus: got 2, wanted 1 .*LoRA dropout.*set gpus to 1") as caught:
        _method_of(case.spec, inputs)(case.model(), on_step=lambda _: Action.CONTINUE)
    assert caught.value.param == "spec.gpus"
