"""The engine on a tiny random Llama: exactness of loss and gradient, schedules, resuming, refusals."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from finery_common.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from finery_common.spec import OptimizerSpec, TrainingSpec
from finery_trainer import engine
from finery_trainer.engine.data import IGNORE, TokenDataset, epoch_order
from finery_trainer.engine.generic import GenericPasses
from finery_trainer.engine.loop import Action, steps_of
from finery_trainer.engine.passes import PackedPasses
from finery_trainer.engine.trained import flatten


def spec_of(**fields) -> TrainingSpec:
    defaults = {"base_model": "tiny", "max_sequence_length": 64, "optimizer": {"learning_rate": 0.01, "min_warmup_steps": 1}}
    return TrainingSpec.parse({**defaults, **fields})


def load(spec, base_dir) -> Any:
    return engine.load(spec, base_dir, device=torch.device("cpu"))


def go_on(_report):
    return Action.CONTINUE


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def passes_of(path, model, **batch):
    if path == "generic":
        return GenericPasses(model, spec_of(batch=batch))
    return PackedPasses(model, spec_of(batch=batch), longest_row=64, mean_row=20.0, num_tokens=500)


def gradients_of(path, model, data, rows, **batch):
    passes = passes_of(path, model, **batch)
    loss = passes.gradients([data.training_row(row) for row in rows]).item()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    return loss, gradients


@pytest.fixture
def data(tmp_path, write_rows, tiny_rows) -> TokenDataset:
    return TokenDataset(write_rows(tmp_path / "data", tiny_rows))


def test_rows_are_read_across_shards_with_targets_shifted_by_one(data, tiny_rows):
    assert data.num_rows == len(tiny_rows)
    assert data.num_tokens == sum(map(len, tiny_rows))
    for index in (3, 20):
        row, (ids, targets) = tiny_rows[index], data.training_row(index)
        length, middle = len(row), len(row) // 2
        assert ids.tolist() == row
        assert targets.tolist() == [*(row[t + 1] if t + 1 >= middle else IGNORE for t in range(length - 1)), IGNORE]


@pytest.mark.parametrize("path", ["packed", "generic"])
def test_loss_and_gradient_equal_transformers_own(tiny_base_dir, data, path):
    model = load(spec_of(), tiny_base_dir)
    _, ours = gradients_of(path, copy.deepcopy(model), data, [5])
    ids, targets = (torch.from_numpy(part)[None] for part in data.training_row(5))
    labels_BT = torch.full_like(ids, IGNORE)
    labels_BT[:, 1:] = targets[:, :-1]
    model(input_ids=ids, labels=labels_BT).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", [("generic", {"micro_batch_size": size}) for size in (1, 2, 3)] + [("packed", {"max_tokens": 64})])
def test_any_split_of_the_same_rows_gives_the_same_gradient(tiny_base_dir, data, split):
    path, batch = split
    model = load(spec_of(), tiny_base_dir)
    rows = list(range(8))
    whole_loss, whole = gradients_of(path, copy.deepcopy(model), data, rows, **({"micro_batch_size": 8} if path == "generic" else {}))
    loss, split = gradients_of(path, model, data, rows, **batch)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-7)


def test_padding_changes_nothing(tiny_base_dir, data):
    model = load(spec_of(), tiny_base_dir)
    shortest, longest = int(np.argmin(data.row_lengths)), int(np.argmax(data.row_lengths))
    stack = GenericPasses(model, spec_of()).stack
    rows = [data.training_row(shortest), data.training_row(longest)]
    together = stack.loss(rows)
    apart = stack.loss(rows[:1]) + stack.loss(rows[1:])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


def test_a_run_is_deterministic_and_reports_every_step(tiny_base_dir, data):
    spec = spec_of(num_epochs=2, lora={"dropout": 0.1})
    runs = []
    for _ in range(2):
        model, reports = load(spec, tiny_base_dir), []
        engine.loop.train(model, data, spec, lambda report, to=reports: (to.append(report), Action.CONTINUE)[1], validation=data)
        runs.append((reports, weights_of(model)))
    (first, first_weights), (second, second_weights) = runs
    assert [report.loss for report in first] == [report.loss for report in second]
    assert all(torch.equal(first_weights[name], second_weights[name]) for name in first_weights)
    assert [report.step for report in first] == list(range(1, 7))
    assert [report.is_epoch_end for report in first] == [False, False, True] * 2
    assert [report.validation_loss is not None for report in first] == [False, False, True] * 2
    assert first[-1].num_trained_tokens == 2 * data.num_tokens
    assert first[-1].epoch == 2.0
    assert first[-1].validation_loss < first[2].validation_loss
    assert all(report.tokens_per_second > 0 and report.memory_bytes > 2**20 and report.grad_norm > 0 for report in first)


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_resumed_run_is_bit_equal_to_one_never_stopped(tiny_base_dir, data, tmp_path, stop_after):
    spec = spec_of(num_epochs=2, lora={"dropout": 0.1})
    straight, losses = load(spec, tiny_base_dir), []
    engine.loop.train(straight, data, spec, lambda report: (losses.append(report.loss), Action.CONTINUE)[1])

    def pause(report):
        return Action.PAUSE if report.step == stop_after else Action.CONTINUE

    folder = tmp_path / "state"
    folder.mkdir()
    stopped = load(spec, tiny_base_dir)
    outcome = engine.loop.train(stopped, data, spec, pause, on_checkpoint=lambda report, save: save(folder))
    assert outcome.last is not None
    assert (outcome.action, outcome.last.step) == (Action.PAUSE, stop_after)

    torch.manual_seed(999)
    resumed, resumed_losses = load(spec, tiny_base_dir), []
    engine.loop.train(resumed, data, spec, lambda r: (resumed_losses.append(r.loss), Action.CONTINUE)[1], resume_from=folder)
    assert resumed_losses == losses[stop_after:]
    straight_weights, resumed_weights = weights_of(straight), weights_of(resumed)
    assert all(torch.equal(straight_weights[name], resumed_weights[name]) for name in straight_weights)


def test_a_state_of_another_run_is_refused(tiny_base_dir, data, tmp_path, write_rows):
    spec = spec_of(checkpoint={"interval_steps": 1}, max_steps=1)
    (tmp_path / "state").mkdir()
    engine.loop.train(load(spec, tiny_base_dir), data, spec, go_on, on_checkpoint=lambda _, save: save(tmp_path / "state"))
    with pytest.raises(DataLossError, match="1 steps"):
        engine.loop.train(load(spec, tiny_base_dir), data, replace_steps(spec, 2), go_on, resume_from=tmp_path / "state")
    other = spec_of(lora={"rank": 3}, max_steps=1)
    with pytest.raises(DataLossError, match="LoRA shape"):
        engine.loop.train(load(other, tiny_base_dir), data, other, go_on, resume_from=tmp_path / "state")


def replace_steps(spec, max_steps):
    return spec.model_copy(update={"max_steps": max_steps})


def test_cancel_stops_after_the_step_it_was_asked_at(tiny_base_dir, data):
    spec, seen = spec_of(), []

    def cancel(report):
        seen.append(report.step)
        return Action.CANCEL if report.step == 2 else Action.CONTINUE

    outcome = engine.loop.train(load(spec, tiny_base_dir), data, spec, cancel)
    assert (outcome.action, seen) == (Action.CANCEL, [1, 2])


def test_checkpoints_come_at_every_interval_and_epoch_end(tiny_base_dir, data):
    spec, steps = spec_of(num_epochs=2, checkpoint={"interval_steps": 2}), []
    engine.loop.train(load(spec, tiny_base_dir), data, spec, go_on, on_checkpoint=lambda report, _: steps.append(report.step))
    assert steps == [2, 3, 4, 6]


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own():
    orders = [epoch_order(50, seed=7, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epoch_order(50, seed=7, epoch=1) == orders[1]
    assert epoch_order(50, seed=8, epoch=1) != orders[1]


@pytest.mark.parametrize(
    ("rows", "fields", "wanted"), [(22, {}, (3, 3)), (22, {"num_epochs": 3}, (3, 9)), (22, {"max_steps": 2}, (3, 2)), (1, {}, (1, 1))]
)
def test_steps_are_counted(rows, fields, wanted):
    assert steps_of(rows, spec_of(**fields)) == wanted


def test_the_step_is_adamw_with_clipping_and_decay_of_matrices_alone():
    spec = OptimizerSpec(learning_rate=0.1, weight_decay=0.1, max_grad_norm=0.5, schedule="constant", warmup_ratio=0, min_warmup_steps=0)
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    expected_matrix, expected_bias = copy.deepcopy(matrix), copy.deepcopy(bias)
    stepper = engine.optim.build_flat_optimizer(spec, [flatten([matrix, bias])], num_steps=10)
    oracle = torch.optim.AdamW(
        [{"params": [expected_matrix], "weight_decay": 0.1}, {"params": [expected_bias], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.999)
    )
    for parameter in (matrix, bias):
        assert parameter.grad is not None
        parameter.grad.fill_(2.0)
    norm = math.sqrt(6 * 4.0)
    assert stepper.apply() == pytest.approx(norm)
    for parameter in (expected_matrix, expected_bias):
        parameter.grad = torch.full_like(parameter, 2.0 * 0.5 / (norm + 1e-6))
    oracle.step()
    torch.testing.assert_close(matrix, expected_matrix)
    torch.testing.assert_close(bias, expected_bias)


def test_schedules_rise_to_the_peak_and_fall_towards_zero():
    spec = OptimizerSpec(learning_rate=1.0, warmup_ratio=0.2, min_warmup_steps=1)
    for kind in ("linear", "cosine", "constant"):
        each = spec.model_copy(update={"schedule": type(spec.schedule)(kind)})
        schedule = engine.optim.build_flat_optimizer(each, [], num_steps=20).schedule
        rates = [schedule.learning_rate(step) for step in range(1, 22)]
        assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        if kind == "constant":
            assert rates[4:] == [1.0] * 17
        else:
            assert rates[4:] == sorted(rates[4:], reverse=True)
            assert rates[19] > 0
            assert rates[20] == pytest.approx(0)


def test_warm_up_is_never_longer_than_the_run():
    stepper = engine.optim.build_flat_optimizer(OptimizerSpec(min_warmup_steps=50), [], num_steps=4)
    assert stepper.schedule.num_warmup_steps == 4
    assert all(0 < stepper.schedule.learning_rate(step) < 2e-4 for step in range(1, 5))


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["packed", "generic"])
@pytest.mark.parametrize("kind", ["adamw_8bit", "adamw_bf16"])
def test_small_optimizer_states_train_nearly_as_float32_ones(tiny_base_dir, data, kind, lora):
    losses = {}
    for each in ("adamw", kind):
        spec, losses[each] = spec_of(optimizer={"type": each, "learning_rate": 0.01}, lora=lora, num_epochs=3), []
        engine.loop.train(load(spec, tiny_base_dir), data, spec, lambda r, to=losses[each]: (to.append(r.loss), Action.CONTINUE)[1])
    assert losses[kind] != losses["adamw"]
    assert losses[kind] == pytest.approx(losses["adamw"], rel=0.02)


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tiny_base_dir, data):
    spec = spec_of(optimizer={"learning_rate": 1.0, "min_warmup_steps": 0})
    model = load(spec, tiny_base_dir)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))
    with pytest.raises(FailedPreconditionError, match="Lower optimizer.learning_rate") as caught:
        engine.loop.train(model, data, spec, go_on)
    assert caught.value.code == "non_finite_loss"


def test_a_target_module_that_is_not_there_is_named(tiny_base_dir):
    with pytest.raises(InvalidArgumentError, match=r"got 'qkv_proj'.*it has .*down_proj.*q_proj"):
        load(spec_of(lora={"target_modules": ["q_proj", "qkv_proj"]}), tiny_base_dir)


def test_every_lora_setting_reaches_peft(tiny_base_dir):
    lora = {"rank": 3, "alpha": 5.5, "dropout": 0.25, "bias": "lora_only", "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    model = load(spec_of(lora=lora), tiny_base_dir)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert layer.scaling["default"] == pytest.approx(5.5 / math.sqrt(3))
    assert layer.lora_dropout["default"].p == 0.25
    assert model.peft_config["default"].bias == "lora_only"
    assert not hasattr(model.get_base_model().model.layers[0].self_attn.k_proj, "lora_A")


def test_precision_decides_the_weights(tiny_base_dir):
    for precision, wanted in (("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load(spec_of(precision=precision), tiny_base_dir)
        assert model.get_base_model().model.embed_tokens.weight.dtype is wanted


def test_bfloat16_trains_on_a_cpu(tiny_base_dir, data):
    spec, losses = spec_of(precision="bfloat16", num_epochs=4), []
    engine.loop.train(load(spec, tiny_base_dir), data, spec, lambda report: (losses.append(report.loss), Action.CONTINUE)[1])
    assert losses[-1] < losses[0]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FailedPreconditionError, match="no causal language model"):
        load(spec_of(), tmp_path)


def test_a_saved_adapter_is_peft_s_and_gives_the_same_logits(tiny_base_dir, data, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec = spec_of()
    model = load(spec, tiny_base_dir)
    engine.loop.train(model, data, spec, go_on)
    engine.adapter.save(model, tmp_path, base_model="tiny")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["inference_mode"]) == ("tiny", 16, True)
    assert str(tiny_base_dir) not in (tmp_path / "adapter_config.json").read_text()
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base_dir), tmp_path)
    input_ids_BT = torch.from_numpy(data.training_row(0)[0])[None]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids_BT).logits, model(input_ids_BT).logits)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input_ids": np.array([1, 2, 99], dtype=np.int32)}, "token id 99, wanted ids below 64"),
        ({"input_ids": np.array([1, -2, 3], dtype=np.int32)}, "token id -2"),
        ({"label_mask": np.array([1, 0, 0], dtype=np.uint8)}, "Row 0 of the dataset has no token to learn from"),
        ({"row_offsets": np.array([0, 2], dtype=np.int64)}, "do not fit together"),
        ({"row_offsets": np.array([0, 0, 3], dtype=np.int64)}, "do not fit together"),
    ],
)
def test_wrong_shards_are_refused_with_what_is_wrong(tiny_base_dir, tmp_path, write_rows, change, text):
    write_rows(tmp_path, [[1, 2, 3]])
    shard = tmp_path / "shard-00000.safetensors"
    save_file(load_file(shard) | change, shard)
    with pytest.raises(InvalidArgumentError, match=text):
        engine.loop.train(load(spec_of(), tiny_base_dir), TokenDataset(tmp_path), spec_of(), go_on)


def test_a_row_longer_than_the_limit_is_refused(tiny_base_dir, tmp_path, write_rows):
    data = TokenDataset(write_rows(tmp_path, [[1] * 8, [1] * 40]))
    with pytest.raises(InvalidArgumentError, match="row 1 has 40 tokens, the limit is 32"):
        engine.loop.train(load(spec_of(), tiny_base_dir), data, spec_of(max_sequence_length=32), go_on)


def test_an_empty_folder_is_no_dataset(tmp_path):
    with pytest.raises(InvalidArgumentError, match="has no rows"):
        TokenDataset(tmp_path)


def test_a_checkpoint_of_another_optimizer_is_refused_before_anything_is_changed(tiny_base_dir, data, tmp_path):
    spec, other = spec_of(max_steps=1), spec_of(max_steps=1, optimizer={"type": "adamw_8bit"})
    engine.loop.train(load(spec, tiny_base_dir), data, spec, go_on, on_checkpoint=lambda _, save: save(tmp_path))
    model = load(other, tiny_base_dir)
    before = weights_of(model)
    with pytest.raises(DataLossError, match="not those of this optimizer.type"):
        engine.loop.train(model, data, other, go_on, resume_from=tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def _cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda folder: _cut(folder / "state.safetensors"), "state cannot be read .*not fully covered"),
        (lambda folder: (folder / "state.safetensors").unlink(), "state cannot be read"),
        (lambda folder: _cut(folder / "state.json"), "state.json cannot be read"),
        (lambda folder: (folder / "state.json").unlink(), "state.json cannot be read"),
        (lambda folder: save_file({"weight.a": np.zeros(1)}, folder / "state.safetensors"), "state cannot be read .*rng.cpu"),
    ],
)
def test_a_state_that_is_not_whole_is_refused_with_what_to_do(tiny_base_dir, data, tmp_path, spoil, text):
    spec = spec_of(max_steps=2)
    engine.loop.train(load(spec, tiny_base_dir), data, spec, go_on, on_checkpoint=lambda _, save: save(tmp_path))
    engine.loop.train(load(spec, tiny_base_dir), data, spec, go_on, resume_from=tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataLossError, match=f"{text}.*resume from another checkpoint"):
        engine.loop.train(load(spec, tiny_base_dir), data, spec, go_on, resume_from=tmp_path)


def test_a_state_of_another_precision_is_refused(tiny_base_dir, data, tmp_path):
    spec = spec_of(method="full", max_steps=1)
    engine.loop.train(load(spec, tiny_base_dir), data, spec, go_on, on_checkpoint=lambda _, save: save(tmp_path))
    other = spec_of(method="full", max_steps=1, precision="bfloat16")
    with pytest.raises(DataLossError, match="not those of this model, precision and LoRA shape"):
        engine.loop.train(load(other, tiny_base_dir), data, other, go_on, resume_from=tmp_path)


@pytest.mark.parametrize("lora", [{"dropout": 0.3}, {"use_dora": True}])
@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_resumed_run_of_transformers_own_modules_is_bit_equal_too(tiny_base_dir, data, tmp_path, lora, stop_after):
    """Inside an epoch, at its end and behind it; dropout goes on where it was."""
    spec = spec_of(lora={"rank": 4, **lora}, num_epochs=2)
    whole, losses = load(spec, tiny_base_dir), []
    engine.loop.train(whole, data, spec, lambda report: (losses.append(report.loss), Action.CONTINUE)[1], validation=data)

    def pause(report):
        pieces.append(report.loss)
        return Action.PAUSE if report.step == stop_after else Action.CONTINUE

    pieces: list[float] = []
    options: dict[str, Any] = {"validation": data, "on_checkpoint": lambda report, save: report.step == stop_after and save(tmp_path)}
    engine.loop.train(load(spec, tiny_base_dir), data, spec, pause, **options)
    resumed = load(spec, tiny_base_dir)
    torch.manual_seed(99)
    engine.loop.train(resumed, data, spec, lambda report: (pieces.append(report.loss), Action.CONTINUE)[1], resume_from=tmp_path)
    assert pieces == losses
    assert all(torch.equal(weight, weights_of(whole)[name]) for name, weight in weights_of(resumed).items())
