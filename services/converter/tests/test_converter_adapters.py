"""Scaled and combined adapters, opened by PEFT and compared with its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraModel, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finery_common.errors import InvalidArgumentError, UnimplementedError
from finery_converter.adapters import combined, scaled
from finery_converter.merge import plan_merge

TOKENS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module")
def base(make_base) -> Path:
    return make_base()


@pytest.fixture(scope="module")
def adapters(base, make_adapter) -> list[Path]:
    """Three that differ in scale, std and, by their alphas' patterns, in the scales of modules."""
    first = make_adapter(base, r=4, lora_alpha=8)
    second = make_adapter(base, r=4, lora_alpha=6, std=0.1, alpha_pattern={"up_proj": 20})
    third = make_adapter(base, r=4, lora_alpha=4, std=0.03, use_rslora=True)
    for number, folder in enumerate((first, second, third)):
        _change(folder, lambda tensors, seed=number: _shuffle(tensors, seed))
    return [first, second, third]


def _shuffle(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    for value in tensors.values():
        value.copy_(value.view(-1)[torch.randperm(value.numel(), generator=generator)].view(value.shape))


def _change(folder: Path, change=None, **config) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def _peft(base: Path, adapters: list[Path]) -> PeftModel:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters[1:], start=1):
        model.load_adapter(folder, adapter_name=str(number))
    return model.eval()


def _deltas(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    return {
        key: module.get_delta_weight(name).double()
        for key, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name in module.lora_A
    }


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.double()


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("scale", [0.5, 0.3, 2, -1.0, 0])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_scaled_adapter_has_a_scaled_update_and_the_same_tensors(base, adapters, out, scale, which):
    scaled(adapters[which], out, scale=scale)
    assert (out / "adapter_model.safetensors").read_bytes() == (adapters[which] / "adapter_model.safetensors").read_bytes()
    before, after = _deltas(_peft(base, [adapters[which]]), "0"), _deltas(_peft(base, [out]), "0")
    assert len(before) == 14
    for name, delta in before.items():
        assert torch.allclose(after[name], delta * scale, rtol=1e-6, atol=1e-12)
    plans = [plan_merge(base, folder, stored_as=torch.float32).updates for folder in (adapters[which], out)]
    assert all(plans[1][name].scale == pytest.approx(update.scale * scale, rel=1e-15) for name, update in plans[0].items())


def test_a_whole_alpha_stays_a_whole_number(adapters, out):
    scaled(adapters[0], out, scale=0.5)
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 4
    assert '"lora_alpha": 4,' in (out / "adapter_config.json").read_text()


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm"], "target_modules": ["q_proj"]}])
def test_what_alpha_does_not_scale_is_refused(make_base, make_adapter, out, lora):
    adapter = make_adapter(make_base(bias=True), **lora)
    for attempt in (lambda: scaled(adapter, out, scale=0.5), lambda: combined([(adapter, 1.0), (adapter, 1.0)], out)):
        with pytest.raises(UnimplementedError, match="only low-rank pairs can be"):
            attempt()
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("method", "density"),
    [("linear", None), ("cat", None), ("ties", 0.5), ("ties", 1.0), ("magnitude_prune", 0.3)],
)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
def test_a_combination_is_that_of_peft(base, adapters, out, method, density, weights):
    combined(list(zip(adapters[:2], weights, strict=True)), out, method=method, density=density)
    model = _peft(base, [*adapters[:2], out])
    model.add_weighted_adapter(["0", "1"], list(weights), "theirs", combination_type=method, density=density)
    ours, theirs = _deltas(model, "2"), _deltas(model, "theirs")
    assert len(ours) == 14
    # PEFT rounds the product of weight and scale into A one after the other, this converter once.
    tolerance = 1e-6 if method == "cat" else 0.0
    for name, delta in theirs.items():
        assert (ours[name] - delta).abs().max() <= tolerance * delta.abs().max()
    model.set_adapter("2")
    mine = _logits(model)
    model.set_adapter("theirs")
    assert torch.allclose(mine, _logits(model), rtol=0, atol=10 * tolerance)
    assert plan_merge(base, out, stored_as=torch.float32).updates.keys() == {
        f"{name.removeprefix('base_model.model.')}.weight" for name in ours
    }


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dropping_at_random_is_that_of_peft_under_the_same_seed(base, make_adapter, out, method, monkeypatch):
    # One module a layer: there PEFT's order is that of names.
    both = [make_adapter(base, target_modules=["up_proj"], std=std) for std in (0.05, 0.1)]
    state = torch.get_rng_state()
    combined([(both[0], 0.5), (both[1], 0.5)], out, method=method, density=0.4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    model = _peft(base, [*both, out])
    inject = LoraModel.inject_adapter

    def inject_and_seed(self, *args, **kwargs):
        # PEFT draws the new adapter's first matrices before it combines; here there are none to draw.
        inject(self, *args, **kwargs)
        torch.manual_seed(7)

    monkeypatch.setattr(LoraModel, "inject_adapter", inject_and_seed)
    model.add_weighted_adapter(["0", "1"], [0.5, 0.5], "theirs", combination_type=method, density=0.4)
    ours, theirs = _deltas(model, "2"), _deltas(model, "theirs")
    assert len(ours) == 2
    for name, delta in theirs.items():
        assert torch.equal(ours[name], delta)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(adapters, tmp_path):
    files = []
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        combined([(adapters[0], 0.5), (adapters[1], 0.5)], tmp_path / str(number), method="dare_ties", density=0.5, seed=seed)
        files.append((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_cat_is_the_exact_sum_of_the_updates_rank_stabilized_ones_too(base, adapters, out):
    weights = (0.5, -0.25, 1 / 3)
    combined(list(zip(adapters, weights, strict=True)), out, method="cat")
    model = _peft(base, [*adapters, out])
    parts = [_deltas(model, str(number)) for number in range(3)]
    for name, delta in _deltas(model, "3").items():
        exact = torch.stack([weight * part[name] for weight, part in zip(weights, parts, strict=True)]).sum(0)
        assert (delta - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 12


def test_adapters_of_unequal_ranks_are_combined_by_cat_only(base, adapters, make_adapter, out):
    other = make_adapter(base, r=2, rank_pattern={"down_proj": 6})
    with pytest.raises(InvalidArgumentError, match="only cat combines unequal ranks"):
        combined([(adapters[0], 1.0), (other, 1.0)], out)
    combined([(adapters[0], 1.0), (other, 1.0)], out, method="cat")
    model = _peft(base, [adapters[0], other, out])
    parts = [_deltas(model, name) for name in "01"]
    for name, delta in _deltas(model, "2").items():
        assert torch.allclose(delta, parts[0][name] + parts[1][name], atol=1e-7)


def test_ranks_by_pattern_are_kept(base, make_adapter, out):
    both = [make_adapter(base, r=4, rank_pattern={"down_proj": 2}, std=std) for std in (0.05, 0.1)]
    combined([(both[0], 1.0), (both[1], 1.0)], out)
    assert len(plan_merge(base, out, stored_as=torch.float32).updates) == 14
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert set(config["rank_pattern"].values()) == {2}
    assert _deltas(_peft(base, [out]), "0")


def test_adapters_that_do_not_match_are_refused(base, adapters, make_base, make_adapter, out, tmp_path):
    fewer = make_adapter(base, target_modules=["q_proj"])
    foreign = _change(shutil.copytree(adapters[0], tmp_path / "foreign"), base_model_name_or_path="someone/another-model")

    def widen(tensors):
        name = next(name for name in tensors if "up_proj.lora_B" in name)
        tensors[name] = torch.cat((tensors[name], tensors[name][:1]))

    wider = _change(shutil.copytree(adapters[0], tmp_path / "wider"), widen)
    for other, words in ((fewer, "differ in 12 modules"), (foreign, "another-model"), (wider, "same base model")):
        with pytest.raises(InvalidArgumentError, match=words) as caught:
            combined([(adapters[0], 1.0), (other, 1.0)], out)
        assert caught.value.code == "adapters_do_not_match"
    assert not list(out.iterdir())


def test_broken_adapters_are_named(adapters, out, tmp_path):
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    lone = _change(shutil.copytree(adapters[0], tmp_path / "lone"), lambda tensors: tensors.pop(key))
    half = _change(shutil.copytree(adapters[0], tmp_path / "half"), lambda tensors: tensors.pop(key.replace("_B", "_A")))
    spoiled = _change(shutil.copytree(adapters[0], tmp_path / "nan"), lambda tensors: tensors[key].fill_(float("nan")))
    for folder, words in (
        (lone, "no B"),
        (half, "has no lora_A beside it"),
        (spoiled, r"up_proj\.lora_B.* of the adapter nan contains NaN"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            combined([(adapters[0], 1.0), (folder, 1.0)], out)
        shutil.rmtree(out)
        out.mkdir()


@pytest.mark.parametrize(("method", "density"), [("ties", None), ("dare_linear", 0.0), ("dare_ties", 1.5), ("linear", 0.5), ("cat", 0.5)])
def test_a_density_that_is_missing_or_has_no_place_is_refused(adapters, out, method, density):
    with pytest.raises(InvalidArgumentError, match="density: got") as caught:
        combined([(adapters[0], 1.0), (adapters[1], 1.0)], out, method=method, density=density)
    assert caught.value.param == "density"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scales_and_weights_that_are_no_numbers_are_refused(adapters, out, number):
    with pytest.raises(InvalidArgumentError, match="scale: got"):
        scaled(adapters[0], out, scale=number)
    with pytest.raises(InvalidArgumentError, match="got weight"):
        combined([(adapters[0], number)], out)
