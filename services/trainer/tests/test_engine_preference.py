"""Training on preferences, on a tiny model: the loss against its formula, steps, pauses, resumption, and what it leaves of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from peft import get_peft_model_state_dict
from safetensors.numpy import save_file

pytest.importorskip("trl")

from finery_common.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from finery_common.spec import TrainingSpec
from finery_trainer import engine
from finery_trainer.engine import preference
from finery_trainer.engine.block import Block
from finery_trainer.engine.data import TokenDataset
from finery_trainer.engine.loop import Action
from finery_trainer.engine.preference import PreferenceDataset, train

VOCAB_SIZE = 64
CPU = torch.device("cpu")
Pair = tuple[list[int], list[int], list[int]]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    """A random Llama of two layers. Made here, so that the tests on a GPU need nothing besides this file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=64, tie_word_embeddings=True, **sizes))
    folder = tmp_path_factory.mktemp("base") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs() -> list[Pair]:
    """13 pairs of a prompt, a chosen and a rejected end: with 4 a step, the last step of an epoch has one."""
    random = np.random.default_rng(2)

    def tokens(low: int, high: int) -> list[int]:
        return random.integers(3, VOCAB_SIZE, size=int(random.integers(low, high))).tolist()

    return [(tokens(2, 8), tokens(1, 9), tokens(1, 9)) for _ in range(13)]


def write(folder: Path, pairs: Sequence[Pair]) -> PreferenceDataset:
    folder.mkdir()
    middle = (len(pairs) + 1) // 2
    for number, part in enumerate((pairs[:middle], pairs[middle:])):
        tensors: dict[str, np.ndarray] = {}
        for prefix, side in (("chosen_", 1), ("rejected_", 2)):
            rows = [pair[0] + pair[side] for pair in part]
            masks = [[0] * len(pair[0]) + [1] * len(pair[side]) for pair in part]
            tensors[f"{prefix}input_ids"] = np.array([token for row in rows for token in row], dtype=np.int32)
            tensors[f"{prefix}label_mask"] = np.array([bit for mask in masks for bit in mask], dtype=np.uint8)
            tensors[f"{prefix}row_offsets"] = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        save_file(tensors, folder / f"shard-{number:05}.safetensors")
    return PreferenceDataset(folder)


def spec_of(**fields) -> TrainingSpec:
    return TrainingSpec.parse(
        {
            "base_model": "tiny",
            "method": "dpo",
            "max_sequence_length": 64,
            "lora": {"rank": 4},
            "batch": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
            "optimizer": {"learning_rate": 0.01, "min_warmup_steps": 0},
            **fields,
        }
    )


def run(base_dir, data, spec, *, action_of=lambda report: Action.CONTINUE, **seams):
    """(model, reports, outcome)"""
    model, reports = engine.load(spec, base_dir, device=CPU), []

    def on_step(report):
        reports.append(report)
        return action_of(report)

    return model, reports, train(model, data, spec, on_step, **seams)


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def log_probs(model, prompt, end) -> float:
    """Of the tokens of `end` after `prompt`, summed, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + end])).logits.double()[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(end)[:, None]).sum())


LOSSES = {
    "sigmoid": lambda delta, beta, _smoothing: math.log1p(math.exp(-beta * delta)),
    "hinge": lambda delta, beta, _smoothing: max(0.0, 1 - beta * delta),
    "robust": lambda delta, beta, s: ((1 - s) * math.log1p(math.exp(-beta * delta)) - s * math.log1p(math.exp(beta * delta))) / (1 - 2 * s),
}


@pytest.mark.parametrize("loss_type", [*LOSSES, "ipo"])
def test_the_loss_is_its_formula_over_policy_and_reference(base_dir, tmp_path, pairs, loss_type):
    smoothing = 0.2 if loss_type == "robust" else 0.0
    spec = spec_of(dpo={"beta": 0.7, "loss_type": loss_type, "label_smoothing": smoothing}, optimizer={"learning_rate": 0.05})
    data = write(tmp_path / "data", pairs)
    model, reports, _ = run(base_dir, data, spec, validation=data)
    wanted = []
    for prompt, chosen, rejected in pairs:
        policy = [log_probs(model, prompt, end) for end in (chosen, rejected)]
        with model.disable_adapter():
            reference = [log_probs(model, prompt, end) for end in (chosen, rejected)]
        ratios = [mine - theirs for mine, theirs in zip(policy, reference, strict=True)]
        if loss_type == "ipo":
            wanted.append((ratios[0] / len(chosen) - ratios[1] / len(rejected) - 1 / (2 * 0.7)) ** 2)
        else:
            wanted.append(LOSSES[loss_type](ratios[0] - ratios[1], 0.7, smoothing))
    assert reports[-1].validation_loss == pytest.approx(np.mean(wanted), rel=1e-4)


def test_the_first_loss_is_that_of_a_model_that_prefers_nothing(base_dir, tmp_path, pairs):
    _, reports, _ = run(base_dir, write(tmp_path / "data", pairs), spec_of())
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-6)


def test_preferences_are_learned_and_the_base_stays(base_dir, tmp_path, pairs):
    spec, data = spec_of(num_epochs=15, dpo={"beta": 1.0}, optimizer={"learning_rate": 0.005}), write(tmp_path / "data", pairs)
    before = {name: tensor.clone() for name, tensor in engine.load(spec, base_dir, device=CPU).state_dict().items()}
    model, reports, outcome = run(base_dir, data, spec, validation=data)
    measured = [report.validation_loss for report in reports if report.validation_loss is not None]
    assert len(measured) == 15
    assert measured[-1] < 0.1 < measured[0] < math.log(2)
    assert outcome.action is Action.CONTINUE
    assert outcome.last == reports[-1]
    after = model.state_dict()
    assert after.keys() == before.keys(), "no adapter of a reference is left"
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in after if "lora_" in name}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == changed


@pytest.mark.parametrize(
    "fields", [{"optimizer": {"type": "adamw_bf16"}}, {"lora": {"use_dora": True}}, {"lora": {"b_learning_rate_ratio": 8.0}}]
)
def test_every_kind_of_adapter_and_optimizer_learns_and_resumes(base_dir, tmp_path, pairs, fields):
    data, state = write(tmp_path / "data", pairs), tmp_path / "state"
    optimizer = {"learning_rate": 0.02, "min_warmup_steps": 0, **fields.get("optimizer", {})}
    spec = spec_of(**{"num_epochs": 4, "dpo": {"beta": 1.0}, **fields, "optimizer": optimizer})
    _, reports, _ = run(base_dir, data, spec)

    def save_once(report, save):
        if report.step == 6:
            state.mkdir()
            save(state)

    pause = {"action_of": lambda report: Action.PAUSE if report.step == 6 else Action.CONTINUE, "on_checkpoint": save_once}
    _, before, _ = run(base_dir, data, spec, **pause)
    _, after, _ = run(base_dir, data, spec, resume_from=state)
    assert [report.loss for report in before + after] == [report.loss for report in reports]
    assert reports[-2].loss < reports[0].loss


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """Which passes went through the engine's own layers, in order."""
    seen: list[str] = []
    for name in ("forward", "backward"):
        plain = getattr(Block, name)
        monkeypatch.setattr(Block, name, lambda self, *a, _plain=plain, _name=name, **k: (seen.append(_name), _plain(self, *a, **k))[1])
    return seen


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_policy_and_reference_run_through_the_engines_own_layers(base_dir, tmp_path, pairs, passes, monkeypatch, precision):
    data, spec = write(tmp_path / "data", pairs), spec_of(precision=precision, dpo={"beta": 1.0}, num_epochs=2)
    _, reports, _ = run(base_dir, data, spec)
    # Two layers, for reference and policy, in 7 micro-batches an epoch.
    assert (passes.count("forward"), passes.count("backward")) == (2 * 2 * 7 * 2, 2 * 7 * 2)
    passes.clear()
    monkeypatch.setattr(preference, "bind_layers", lambda _model: "they are not wanted")
    _, plain, _ = run(base_dir, data, spec)
    assert not passes
    losses = [report.loss for report in reports]
    assert losses == pytest.approx([report.loss for report in plain], rel=1e-3 if precision == "float32" else 5e-2)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6), "both see the same arithmetic"


@pytest.mark.parametrize(("lora", "reason"), [({"dropout": 0.1}, "LoRA dropout"), ({"use_dora": True}, "lora_magnitude_vector")])
def test_adapters_that_the_engines_layers_do_not_take_train_by_the_models_own_and_say_so(base_dir, tmp_path, pairs, passes, lora, reason):
    spec = spec_of(lora={"rank": 4, **lora}, num_epochs=2)
    with structlog.testing.capture_logs() as logs:
        _, reports, _ = run(base_dir, write(tmp_path / "data", pairs), spec)
    assert not passes
    assert reports[-1].loss != reports[0].loss
    assert [entry["reason"] for entry in logs if "transformers' own modules" in entry["event"] and reason in entry["reason"]]


def test_reports_count_steps_epochs_and_the_tokens_of_both_rows(base_dir, tmp_path, pairs):
    _, reports, _ = run(base_dir, write(tmp_path / "data", pairs), spec_of(num_epochs=2))
    assert [report.step for report in reports] == list(range(1, 9))
    assert [report.is_epoch_end for report in reports] == [False, False, False, True] * 2
    assert {report.num_steps for report in reports} == {8}
    assert reports[3].num_trained_tokens == sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs)
    assert all(report.memory_bytes > 0 and report.tokens_per_second > 0 and report.grad_norm > 0 for report in reports)


def test_the_split_into_micro_batches_changes_nothing(base_dir, tmp_path, pairs):
    data = write(tmp_path / "data", pairs)
    losses = []
    for micro, accumulation in ((1, 6), (2, 3), (3, 2), (6, 1)):
        batch = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        losses.append([report.loss for report in run(base_dir, data, spec_of(batch=batch))[1]])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_two_runs_are_bit_equal_and_another_seed_is_another_run(base_dir, tmp_path, pairs):
    data, spec = write(tmp_path / "data", pairs), spec_of(lora={"rank": 4, "dropout": 0.2})
    first, second, other = (run(base_dir, data, each) for each in (spec, spec, spec.model_copy(update={"seed": 1})))
    assert [report.loss for report in first[1]] == [report.loss for report in second[1]]
    assert all(torch.equal(tensor, adapter_of(second[0])[name]) for name, tensor in adapter_of(first[0]).items())
    assert [report.loss for report in first[1]] != [report.loss for report in other[1]]


def test_dropout_of_the_adapter_is_kept(base_dir, tmp_path, pairs):
    data = write(tmp_path / "data", pairs)
    plain, dropped = (run(base_dir, data, spec_of(lora={"rank": 4, "dropout": dropout}))[1] for dropout in (0.0, 0.5))
    assert [report.loss for report in plain[1:]] != [report.loss for report in dropped[1:]]


@pytest.mark.parametrize("pause_at", [1, 4, 6])
def test_a_paused_run_goes_on_as_one_never_stopped(base_dir, tmp_path, pairs, pause_at):
    data, spec = write(tmp_path / "data", pairs), spec_of(num_epochs=2, lora={"rank": 4, "dropout": 0.1})
    whole, reports, _ = run(base_dir, data, spec)
    state = tmp_path / "state"

    def save_once(report, save):
        if report.step == pause_at:
            state.mkdir()
            save(state)

    _, before, outcome = run(
        base_dir,
        data,
        spec,
        action_of=lambda report: Action.PAUSE if report.step == pause_at else Action.CONTINUE,
        on_checkpoint=save_once,
    )
    assert outcome.action is Action.PAUSE
    resumed, after, outcome = run(base_dir, data, spec, resume_from=state)
    assert outcome.action is Action.CONTINUE
    assert [report.loss for report in before + after] == [report.loss for report in reports]
    assert all(torch.equal(tensor, adapter_of(resumed)[name]) for name, tensor in adapter_of(whole).items())


def test_a_cancelled_run_stops_at_once_and_saves_nothing(base_dir, tmp_path, pairs):
    saved = []
    _, reports, outcome = run(
        base_dir,
        write(tmp_path / "data", pairs),
        spec_of(),
        action_of=lambda report: Action.CANCEL if report.step == 2 else Action.CONTINUE,
        on_checkpoint=lambda report, save: saved.append(report.step),
    )
    assert (outcome.action, len(reports), saved) == (Action.CANCEL, 2, [])


def test_checkpoints_come_at_intervals_and_epochs(base_dir, tmp_path, pairs):
    saved = []
    spec = spec_of(num_epochs=2, checkpoint={"interval_steps": 3})
    run(base_dir, write(tmp_path / "data", pairs), spec, on_checkpoint=lambda report, save: saved.append(report.step))
    assert saved == [3, 4, 6, 8]


def test_a_state_of_other_data_is_refused(base_dir, tmp_path, pairs):
    spec, state = spec_of(), tmp_path / "state"
    state.mkdir()
    run(base_dir, write(tmp_path / "data", pairs), spec, on_checkpoint=lambda report, save: save(state))
    with pytest.raises(DataLossError, match="over 13 rows or pairs, this one has 1 over 4"):
        run(base_dir, write(tmp_path / "other", pairs[:4]), spec, resume_from=state)


def test_a_run_that_diverges_says_so(base_dir, tmp_path, pairs):
    spec = spec_of()
    model = engine.load(spec, base_dir, device=CPU)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(FailedPreconditionError, match="loss became nan at step 1"):
        train(model, write(tmp_path / "data", pairs), spec, lambda report: Action.CONTINUE)


def test_nobody_is_told_of_a_run(base_dir, tmp_path, pairs, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **fields: pytest.fail(f"told somebody of {fields}"))
    run(base_dir, write(tmp_path / "data", pairs), spec_of(max_steps=1))


def test_rows_without_pairs_and_pairs_that_do_not_fit_are_refused(base_dir, tmp_path, pairs, write_rows, tiny_rows):
    with pytest.raises(InvalidArgumentError, match="chosen_row_offsets") as caught:
        PreferenceDataset(write_rows(tmp_path / "rows", tiny_rows))
    assert caught.value.code == "invalid_dataset"
    data = write(tmp_path / "data", pairs)
    with pytest.raises(InvalidArgumentError, match="row_offsets"):
        TokenDataset(tmp_path / "data")
    with pytest.raises(InvalidArgumentError, match="the limit is 10"):
        run(base_dir, data, spec_of(max_sequence_length=10))
    with pytest.raises(InvalidArgumentError, match=f"got token id {VOCAB_SIZE}"):
        run(base_dir, write(tmp_path / "high", [([VOCAB_SIZE], [3], [4])] * 4), spec_of())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_on_a_gpu_the_loss_is_the_cpus(base_dir, tmp_path, pairs, precision):
    data = write(tmp_path / "data", pairs)
    spec = spec_of(precision=precision, optimizer={"type": "adamw", "learning_rate": 0.01, "min_warmup_steps": 0})
    reports: dict[str, list[float]] = {"cpu": [], "cuda": []}
    for name, losses in reports.items():
        model = engine.load(spec, base_dir, device=torch.device(name))
        train(model, data, spec, lambda report, losses=losses: losses.append(report.loss) or Action.CONTINUE)
    assert reports["cuda"] == pytest.approx(reports["cpu"], rel=1e-3 if precision == "float32" else 3e-2)


@pytest.mark.gpu
def test_on_a_gpu_two_deterministic_runs_are_bit_equal(base_dir, tmp_path, pairs):
    data, spec, runs = write(tmp_path / "data", pairs), spec_of(deterministic=True, num_epochs=3), []
    for _ in range(2):
        model, losses = engine.load(spec, base_dir, device=torch.device("cuda")), []
        train(model, data, spec, lambda report, losses=losses: losses.append(report.loss) or Action.CONTINUE)
        runs.append(losses)
    assert runs[0] == runs[1]
