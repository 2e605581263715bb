"""Whole conversions by the worker's own steps, on folders: what comes out of each format, and that what is not the same model does not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finery_common.errors import FineryError, InvalidArgumentError
from finery_converter import gguf_parity, lora, parity, recipe
from finery_converter.merge import merge, plan_merge
from finery_converter.parity import NotTheSameModelError
from finery_converter.recipe import cook
from finery_converter.task import REPORT_FILE, Task

KEY = "adapters/ftjob-" + "0" * 24 + "-{}"


@pytest.fixture(scope="module")
def base(make_speaker) -> Path:
    return make_speaker(width=256)


@pytest.fixture(scope="module")
def adapters(base, make_adapter) -> list[Path]:
    return [make_adapter(base), make_adapter(base, r=2)]


@pytest.fixture
def run(base, converter_dir, tmp_path) -> Callable[..., tuple[Path, dict]]:
    """Cooks a spec; answers the output folder and the report."""

    def cooked(*adapter_dirs: Path, base_dir: Path = base, trained_on: str = "plain", **spec) -> tuple[Path, dict]:
        scratch = tmp_path / f"scratch-{len(list(tmp_path.iterdir()))}"
        (scratch / "output").mkdir(parents=True)
        source: dict = {"adapter": KEY.format(1)} if len(adapter_dirs) == 1 else {}
        if len(adapter_dirs) > 1:
            source = {"adapters": [{"adapter": KEY.format(number)} for number in range(len(adapter_dirs))]}
        if not adapter_dirs:
            source = {"model": "models/ftjob-" + "0" * 24}
        dirs = tuple(map(str, adapter_dirs))
        places = {"output_dir": str(scratch / "output"), "scratch_dir": str(scratch), "converter_dir": str(converter_dir)}
        about = {"trained_on": trained_on, "precision": "float32", "device": "cpu", "model_name": "m"}
        shares: list[float] = []
        cook(
            Task(spec=source | spec, base_dir=str(base_dir), adapter_dirs=dirs, dataset_dir=None, **about, **places),
            lambda _, share: shares.append(share),
        )
        assert shares == sorted(shares)
        assert 0 <= shares[0] <= shares[-1] <= 1 + 1e-9
        return scratch / "output", json.loads((scratch / REPORT_FILE).read_text())

    return cooked


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter))(torch.arange(5, 25)[None]).logits


def test_a_merged_folder_says_what_the_adapter_says_and_tells_by_how_much_not(run, base, adapters):
    output, report = run(adapters[0], type="f32")
    torch.testing.assert_close(logits(output), logits(base, adapters[0]), rtol=1e-4, atol=1e-4)
    assert report["parity"]["weights"]["num_wrong"] == 0
    assert report["calibration"]["source"] == "passages"


def test_several_adapters_are_summed_and_scaled(run, base, adapters):
    output, _ = run(*adapters, type="f32", scale=0.5)
    plain = {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}
    both = {name: tensor.double() for name, tensor in load_file(output / "model.safetensors").items()}
    alone = [
        {name: tensor.double() for name, tensor in load_file(run(item, type="f32")[0] / "model.safetensors").items()} for item in adapters
    ]
    name = "model.layers.1.mlp.down_proj.weight"
    wanted = plain[name] + 0.5 * sum(each[name] - plain[name] for each in alone)
    torch.testing.assert_close(both[name], wanted, rtol=0, atol=1e-6)


def test_an_adapter_stays_one(run, base, adapters):
    output, report = run(adapters[0], format="adapter", scale=2.0)
    assert json.loads((output / "adapter_config.json").read_text())["lora_alpha"] == 16
    assert report == {"adapter": {"num_tensors": 28, "num_numbers": 32768}}
    assert not torch.allclose(logits(base, output), logits(base, adapters[0]))


def test_a_model_trained_whole_is_converted_without_an_adapter(run, base):
    output, report = run(type="bf16")
    weights = load_file(output / "model.safetensors")
    original = load_file(base / "model.safetensors")
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in original.items())
    assert report["parity"]["weights"]["num_wrong"] == 0


@pytest.mark.slow
def test_a_quantized_folder_of_a_real_model_passes_its_gate(run, base_model_dir, make_adapter):
    """Of random weights no two tokens are far enough apart for any type to agree on the first."""
    output, report = run(make_adapter(base_model_dir, std=0.01), base_dir=base_model_dir, type="fp8")
    assert "quantization_config" in json.loads((output / "config.json").read_text())
    assert report["parity"]["type"] == "fp8"
    assert report["parity"]["lossy_budget"]["max_mean_kl"] > report["parity"]["difference"]["mean_kl"] > 0


def test_a_gguf_file_comes_with_what_was_measured_of_it_and_a_modelfile(run, adapters):
    output, report = run(adapters[0], format="gguf", type="f16")
    assert {path.name for path in output.iterdir()} == {"model.f16.gguf", "Modelfile"}
    assert "FROM ./model.f16.gguf" in (output / "Modelfile").read_text()
    assert report["gguf"]["mean_kl"] < 1e-3
    assert report["parity"]["type"] == "f32"


@pytest.mark.slow
def test_a_quantized_gguf_file_of_a_real_model_passes_its_gate_and_tells_what_fell_back(run, base_model_dir, make_adapter):
    adapter = make_adapter(base_model_dir, std=0.01)
    output, report = run(adapter, base_dir=base_model_dir, format="gguf", type="q4_k_m", importance_matrix=True)
    assert {path.name for path in output.iterdir()} == {"model.q4_k_m.gguf", "Modelfile"}
    assert report["importance_matrix"]["num_tokens"] > 1000
    assert 0 < report["quantized"]["mean_kl"] < report["quantized"]["budget"]["max_mean_kl"]
    assert {item["got"] for item in report["tensors_of_other_types"]}, "widths of 576 are no multiple of 256"


@pytest.mark.parametrize("type_", ["f16", "q8_0"])
def test_a_tensor_that_no_file_may_hold_is_told_of_before_anything_is_written(run, adapters, tmp_path, type_):
    wanted = (
        r"max_file_size_bytes: got [12]0,000,000, but model.embed_tokens.weight with the file's own data takes ([\d,]+); allow at least"
    )
    with pytest.raises(InvalidArgumentError, match=wanted) as caught:
        run(adapters[0], format="gguf", type=type_, max_file_size_bytes=20_000_000 if type_ == "f16" else 10_000_000)
    assert not list(tmp_path.glob("*/merged"))
    least_bytes = int(re.findall(r"takes ([\d,]+)", caught.value.message)[0].replace(",", ""))
    output, _ = run(adapters[0], format="gguf", type=type_, max_file_size_bytes=least_bytes)
    assert max(path.stat().st_size for path in output.glob("*.gguf")) <= least_bytes


def test_an_adapter_of_a_base_that_exists_as_nf4_only_becomes_a_gguf_adapter(run, base, adapters, tmp_path):
    nf4_base = tmp_path / "nf4"
    nf4_base.mkdir()
    merge(plan_merge(base, None, stored_as=torch.bfloat16, form="nf4"), nf4_base, on_progress=lambda _: None)
    output, report = run(adapters[0], base_dir=nf4_base, format="gguf_adapter", trained_on="nf4")
    assert [path.name for path in output.iterdir()] == ["adapter.f16.gguf"]
    assert report["gguf"]["mean_kl"] < 1e-6 < 0.1 < report["base_alone"]["mean_kl"]


def test_an_adapter_becomes_a_gguf_adapter(run, adapters):
    output, report = run(adapters[0], format="gguf_adapter")
    assert [path.name for path in output.iterdir()] == ["adapter.f16.gguf"]
    assert (output / "adapter.f16.gguf").read_bytes()[:4] == b"GGUF"
    assert report["adapter"]["num_tensors"] == len(load_file(adapters[0] / "adapter_model.safetensors"))
    assert report["gguf"]["mean_kl"] < 1e-6 < 0.1 < report["base_alone"]["mean_kl"]
    assert report["gguf"]["candidate_perplexity"] == pytest.approx(report["gguf"]["reference_perplexity"], rel=1e-3)


def test_a_faint_gguf_adapter_is_judged_by_what_it_does(run, base, make_adapter, monkeypatch):
    """By the type's own budget twice its scale would do: all that the adapter does is a fortieth of it."""
    faint = make_adapter(base, std=0.005)
    _, report = run(faint, format="gguf_adapter", type="q8_0")
    assert report["gguf"]["mean_kl"] < 1e-3 * report["base_alone"]["mean_kl"] < 1e-3 * 0.05
    monkeypatch.setattr(recipe.hf_to_gguf, "_has_own_scales", lambda _: True)
    monkeypatch.setattr(recipe.hf_to_gguf, "_of_module", lambda *_, default: 2 * default)
    with pytest.raises(NotTheSameModelError, match="the KL divergence is"):
        run(faint, format="gguf_adapter", type="q8_0")


def test_a_gguf_adapter_that_says_something_else_or_lacks_a_number_is_not_published(run, adapters, monkeypatch):
    right = recipe.hf_to_gguf.convert_lora

    def doubled(adapter_dir, base_dir, output_file, **options):
        monkeypatch.setattr(recipe.hf_to_gguf, "_has_own_scales", lambda _: True)
        monkeypatch.setattr(recipe.hf_to_gguf, "_of_module", lambda *_, default: 2 * default)
        right(adapter_dir, base_dir, output_file, **options)

    def halved(adapter_dir, base_dir, output_file, **options):
        right(adapter_dir, base_dir, output_file, **options)
        right(adapters[1], base_dir, output_file, **options)

    for wrong, reason in ((doubled, "the KL divergence is"), (halved, "holds .* numbers and the adapter that it was made of")):
        with monkeypatch.context() as patch:
            patch.setattr(recipe.hf_to_gguf, "convert_lora", wrong)
            with pytest.raises(NotTheSameModelError, match=reason):
                run(adapters[0], format="gguf_adapter")


def test_a_merge_that_leaves_an_adapters_tensor_out_is_not_published(run, adapters, monkeypatch):
    right = recipe.plan_merge

    def forgetful(*args, **options):
        plan = right(*args, **options)
        del plan.updates["model.layers.1.self_attn.v_proj.weight"]
        return plan

    monkeypatch.setattr(recipe, "plan_merge", forgetful)
    with pytest.raises(NotTheSameModelError, match=r"in 1 tensors such as model\.layers\.1\.self_attn\.v_proj\.weight") as caught:
        run(adapters[0])
    assert caught.value.code == "parity_failed"


def test_a_merge_of_twice_the_scale_is_not_published_and_its_numbers_are_kept(run, adapters, monkeypatch, tmp_path):
    right = lora.scale_of
    monkeypatch.setattr(lora, "scale_of", lambda *given: (right(*given)[0], 2 * right(*given)[1]))
    with pytest.raises(NotTheSameModelError):
        run(adapters[0], type="bf16")
    [report] = tmp_path.glob(f"*/{REPORT_FILE}")
    assert json.loads(report.read_text())["parity"]["weights"]["num_wrong"] > 0


def test_an_adapter_key_without_a_place_fails_each_format(run, base, adapters, tmp_path):
    from safetensors.torch import save_file

    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "adapter_config.json").write_bytes((adapters[0] / "adapter_config.json").read_bytes())
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.0.mlp", "layers.7.mlp"): tensor for name, tensor in tensors.items()}, changed / "adapter_model.safetensors"
    )
    for format_ in ("safetensors", "adapter", "gguf_adapter"):
        with pytest.raises(InvalidArgumentError, match=r"layers\.7") as caught:
            run(changed, format=format_)
        assert caught.value.code == "unmatched_adapter_tensor"


def test_nan_in_a_base_is_found(run, base, adapters, tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in base.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FineryError, match=r"layers\.0\.mlp\.up_proj"):
        run(adapters[0], base_dir=broken)


def test_nan_in_an_adapter_is_found_where_nothing_is_merged(run, adapters, tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapters[0] / "adapter_config.json").read_bytes())
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(InvalidArgumentError, match=f"tensor {name} has NaN or Inf"):
        run(broken, format="adapter")


def test_logits_that_are_no_numbers_pass_no_budget():
    statistics = gguf_parity._Statistics()
    rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).numpy()
    wrong = rows.copy()
    wrong[-1] = float("nan")
    statistics.add(rows, wrong, torch.tensor([1, 2, 3]).numpy())
    found = statistics.result()
    for budget in parity.LOSSY.values():
        assert budget.failures(mean_kl=found.mean_kl, top1=found.top1_agreement)


def test_a_report_can_hold_what_json_cannot(run, adapters, monkeypatch, tmp_path):
    def fails(self, _):
        self.report["perplexity"] = {"base": float("inf"), "merged": [float("nan"), 1.5]}
        raise InvalidArgumentError("the reason")

    monkeypatch.setattr(recipe.Recipe, "_compare", fails)
    with pytest.raises(InvalidArgumentError, match="the reason"):
        run(adapters[0])
    [report] = tmp_path.glob(f"*/{REPORT_FILE}")
    assert json.loads(report.read_text()) == {"perplexity": {"base": "inf", "merged": ["nan", 1.5]}}
