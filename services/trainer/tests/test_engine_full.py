"""Method full on tiny models: a resumed run is the run that never stopped, and the folder it leaves is a whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from finery_common.spec import TrainingSpec
from finery_trainer import engine
from finery_trainer.engine.data import TokenDataset
from finery_trainer.engine.loop import Action

VOCAB_SIZE = 64
CPU = torch.device("cpu")
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model")


def spec_of(**fields) -> TrainingSpec:
    defaults = {"base_model": "tiny", "method": "full", "max_sequence_length": 64, "optimizer": {"learning_rate": 0.01}}
    return TrainingSpec.parse({**defaults, **fields})


@pytest.fixture
def data(tmp_path, write_rows, tiny_rows) -> TokenDataset:
    return TokenDataset(write_rows(tmp_path / "data", tiny_rows))


@pytest.fixture(params=["tied", "untied", "generic"])
def base_dir(request, tmp_path) -> Path:
    """A Llama with or without tied embeddings, or a model that the engine's own layers do not take (tied, with biases)."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    if request.param == "generic":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, max_position_embeddings=64, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64, tie_word_embeddings=request.param == "tied"))
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    # As some published models have it: transformers reads it and refuses to write it.
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.5, "eos_token_id": 2}))
    for name in TOKENIZER:
        (folder / name).write_text(f"{name} of the base")
    (folder / "notes of the author.txt").write_text("no business of ours")
    return folder


def run(base_dir, data, spec, *, action_of=lambda report: Action.CONTINUE, **seams):
    """(model, losses)"""
    model, losses = engine.load(spec, base_dir, device=CPU), []

    def on_step(report):
        losses.append(report.loss)
        return action_of(report)

    engine.loop.train(model, data, spec, on_step, **seams)
    return model, losses


def saved(model, folder, base_dir, **options) -> Path:
    folder.mkdir()
    engine.full_model.save(model, folder, base_dir=base_dir, **options)
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
def test_a_resumed_run_is_bit_equal_to_one_never_stopped(base_dir, data, tmp_path, optimizer):
    spec = spec_of(num_epochs=2, optimizer={"type": optimizer, "learning_rate": 0.01, "min_warmup_steps": 1})
    straight, losses = run(base_dir, data, spec)
    state = tmp_path / "state"
    state.mkdir()
    pause = {"action_of": lambda report: Action.PAUSE if report.step == 4 else Action.CONTINUE}
    run(base_dir, data, spec, **pause, on_checkpoint=lambda report, save: save(state))
    torch.manual_seed(999)
    resumed, resumed_losses = run(base_dir, data, spec, resume_from=state)
    assert losses[0] > losses[-1]
    assert resumed_losses == losses[4:]
    ours, theirs = saved(resumed, tmp_path / "resumed", base_dir), saved(straight, tmp_path / "straight", base_dir)
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_a_state_holds_tied_weights_once(base_dir, data, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    model, _ = run(base_dir, data, spec_of(max_steps=1), on_checkpoint=lambda report, save: save(state))
    with safe_open(state / "state.safetensors", "pt") as file:
        weights = [name for name in file.keys() if name.startswith("weight.")]  # noqa: SIM118  # no mapping
    assert len(weights) == len(list(model.parameters())) == len({p.data_ptr() for p in model.parameters()})


def test_the_folder_is_a_whole_model_with_the_bases_tokenizer(base_dir, data, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = run(base_dir, data, spec_of())
    folder = saved(model, tmp_path / "model", base_dir)
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", *TOKENIZER}
    assert all((folder / name).read_bytes() == (base_dir / name).read_bytes() for name in ("generation_config.json", *TOKENIZER))
    ours, theirs = (json.loads((each / "config.json").read_text()) for each in (folder, base_dir))
    assert ours == theirs
    again, base = (AutoModelForCausalLM.from_pretrained(each) for each in (folder, base_dir))
    tokens = torch.tensor([[3, 4, 5, 6]])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    changed = {name for name, tensor in again.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}
    assert changed >= {name for name, _ in again.named_parameters() if "bias" not in name}, "everything was trained"
    with safe_open(folder / "model.safetensors", "pt") as mine, safe_open(base_dir / "model.safetensors", "pt") as of_base:
        assert set(mine.keys()) == set(of_base.keys()), "tied weights stand there once"


def test_large_models_are_written_in_shards(base_dir, data, tmp_path):
    from transformers import AutoModelForCausalLM

    model = engine.load(spec_of(), base_dir, device=CPU)
    folder = saved(model, tmp_path / "model", base_dir, shard_bytes=20_000)
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) > 2
    assert {path.name for path in folder.glob("*.safetensors")} == set(shards.values())
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_base_without_settings_of_generate_stays_without(base_dir, tmp_path):
    (base_dir / "generation_config.json").unlink()
    folder = saved(engine.load(spec_of(), base_dir, device=CPU), tmp_path / "model", base_dir)
    assert not (folder / "generation_config.json").exists()


def test_bfloat16_weights_move_as_float32_ones_at_small_rates(base_dir, data):
    moved = {}
    for precision in ("float32", "bfloat16"):
        spec = spec_of(precision=precision, num_epochs=3, optimizer={"learning_rate": 3e-5, "schedule": "constant", "min_warmup_steps": 0})
        before = engine.load(spec, base_dir, device=CPU).state_dict()
        after = run(base_dir, data, spec)[0].state_dict()
        moved[precision] = torch.cat([(after[name].float() - before[name].float()).flatten() for name in before])
    # Rounding makes noise, but must not eat what is smaller than it: along the way of the float32 run it goes as far.
    exact = moved["float32"]
    assert float(moved["bfloat16"] @ exact / (exact @ exact)) == pytest.approx(1, abs=0.15)
