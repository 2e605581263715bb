"""The parity gate: every right merge passes, every wrong one fails, and the report says by how much."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from finery_common.errors import InvalidArgumentError
from finery_converter.calibration import PASSAGES, arbitrary, dataset_rows, passages
from finery_converter.continuations import continue_greedily
from finery_converter.merge import MergePlan, merge, plan_merge
from finery_converter.parity import CEILINGS, LOSSY, NotTheSameModelError, ParityReport, check_conversion, compare, perplexity
from finery_converter.plain_forms import RoundedWeights
from finery_converter.streamed import StreamedModel
from finery_converter.weight_check import check_weights, half_unit
from finery_converter.weights import FolderWeights, TensorWeights, Weights

SEQUENCES = arbitrary(vocab_size=320).sequences
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SMALL_STD, LARGE_STD = 1e-3, 0.2
_SMALL = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": LlamaConfig(**_SMALL),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SMALL, head_dim=16),
    "gemma3": Gemma3TextConfig(**_SMALL, head_dim=16, sliding_window=8),
    "phi3": Phi3Config(**_SMALL),
    "mixtral": MixtralConfig(**_SMALL, num_local_experts=4),
}
MODULES = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
_LLAMA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _base(family: str, folder: Path, *, seed: int = 5, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Weights as training leaves them: matrices that keep the size of what they multiply, and norms near one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def _adapter(base: Path, folder: Path, *, family: str = "llama", std: float = LARGE_STD) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=MODULES.get(family, _LLAMA_MODULES), task_type="CAUSAL_LM"),
    )
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def _merged(base: Path, adapter: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """PEFT's own merge in float32, rounded once."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model.merge_and_unload().to(dtype).save_pretrained(folder)
    return folder


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], *, name: str = "model.safetensors") -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})


def _gate(
    base: Path, merged: Path, adapter: Path | None, *, type_: str = "bf16", form: str | None = None, base_weights: Weights | None = None
) -> ParityReport:
    return check_conversion(
        base,
        merged,
        adapter_dir=adapter,
        dtype=DTYPES[type_],
        type_=form or type_,
        sequences=SEQUENCES,
        base_weights=base_weights,
    )


def _logit_failures(base: Path, merged: Path, adapter: Path) -> tuple[str, ...]:
    """What logits alone find."""
    reference = StreamedModel(base, adapter_dir=adapter)
    yardstick = StreamedModel(base, weights=RoundedWeights(reference.adapted_weights, dtype=torch.bfloat16))
    report = compare(
        reference,
        StreamedModel(merged),
        type_="bf16",
        sequences=SEQUENCES,
        yardstick=yardstick,
        ceiling=CEILINGS[torch.bfloat16],
    )
    return report.failures


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {family: _base(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("std", [0.0, SMALL_STD, LARGE_STD])
@pytest.mark.parametrize("type_", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_merge_passes(bases, family, type_, std, tmp_path):
    adapter = _adapter(bases[family], tmp_path / "adapter", family=family, std=std)
    merged = _merged(bases[family], adapter, tmp_path / "merged", dtype=DTYPES[type_])
    report = _gate(bases[family], merged, adapter, type_=type_)
    assert report.weights is not None
    assert report.weights.num_rounded_otherwise < 0.01 * report.weights.num_weights or type_ == "f32"
    assert report.yardstick is not None
    assert report.difference.rms <= 1.1 * report.yardstick.rms + 1e-5 * report.spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_right_merge_of_a_base_of_another_type_passes(dtype, tmp_path):
    base = _base("qwen3", tmp_path / "base", dtype=dtype)
    adapter = _adapter(base, tmp_path / "adapter")
    assert _gate(base, _merged(base, adapter, tmp_path / "merged"), adapter).failures == ()


def test_a_conversion_without_an_adapter_is_held_to_its_rounding(bases, tmp_path):
    AutoModelForCausalLM.from_pretrained(bases["llama"]).to(torch.float16).save_pretrained(tmp_path)
    assert _gate(bases["llama"], tmp_path, None, type_="f16").failures == ()


def _left_out(base: Path, adapter: Path, out: Path) -> None:
    changed = shutil.copytree(adapter, out / "adapter")
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    _change(changed, lambda tensors: tensors.update({key: torch.zeros_like(tensors[key])}), name="adapter_model.safetensors")
    _merged(base, changed, out / "merged")


def _double_scale(base: Path, adapter: Path, out: Path) -> None:
    changed = shutil.copytree(adapter, out / "adapter")
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    _merged(base, changed, out / "merged")


def _half_scale_of_one_layer(base: Path, adapter: Path, out: Path) -> None:
    changed = shutil.copytree(adapter, out / "adapter")

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".layers.0." in name and "lora_B" in name:
                tensors[name] *= 0.5

    _change(changed, halve, name="adapter_model.safetensors")
    _merged(base, changed, out / "merged")


def _transposed_product(base: Path, adapter: Path, out: Path) -> None:
    merged = _merged(base, adapter, out / "merged")
    weight = "model.layers.0.self_attn.o_proj.weight"
    before = load_file(base / "model.safetensors")[weight].float()
    exact = StreamedModel(base, adapter_dir=adapter).adapted_weights
    product = torch.cat(list(exact.blocks(weight))) - before
    _change(merged, lambda tensors: tensors.update({weight: (before + product.t()).to(torch.bfloat16)}))


def _q_and_k_swapped(base: Path, adapter: Path, out: Path) -> None:
    merged = _merged(base, adapter, out / "merged")
    q, k = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk")
    _change(merged, lambda tensors: tensors.update({q: tensors[k], k: tensors[q]}))


def _not_merged_at_all(base: Path, adapter: Path, out: Path) -> None:
    shutil.copytree(base, out / "merged")


def _one_layer_of_another_model(base: Path, adapter: Path, out: Path) -> None:
    merged = _merged(base, adapter, out / "merged")
    other = load_file(_base("llama", out / "other", seed=77) / "model.safetensors")
    _change(merged, lambda tensors: tensors.update({name: other[name] for name in other if ".layers.1." in name}))


FAULTS = [
    _left_out,
    _double_scale,
    _half_scale_of_one_layer,
    _transposed_product,
    _q_and_k_swapped,
    _not_merged_at_all,
    _one_layer_of_another_model,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_logits_alone_tell_a_wrong_merge_of_an_adapter_that_says_something(bases, fault, tmp_path):
    adapter = _adapter(bases["llama"], tmp_path / "adapter0")
    fault(bases["llama"], adapter, tmp_path)
    assert any("logits differ" in text for text in _logit_failures(bases["llama"], tmp_path / "merged", adapter))


@pytest.mark.parametrize("std", [1e-5, SMALL_STD, LARGE_STD])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_fails_a_wrong_merge_however_little_the_adapter_says(bases, fault, std, tmp_path):
    adapter = _adapter(bases["llama"], tmp_path / "adapter0", std=std)
    fault(bases["llama"], adapter, tmp_path)
    with pytest.raises(NotTheSameModelError, match="is not published") as caught:
        _gate(bases["llama"], tmp_path / "merged", adapter)
    assert caught.value.code == "parity_failed"
    assert caught.value.report is not None
    assert caught.value.report.weights is not None
    assert caught.value.report.weights.wrong_tensors


def test_the_message_names_what_is_wrong_and_the_budget(bases, tmp_path):
    adapter = _adapter(bases["llama"], tmp_path / "adapter0")
    _left_out(bases["llama"], adapter, tmp_path)
    with pytest.raises(NotTheSameModelError) as caught:
        _gate(bases["llama"], tmp_path / "merged", adapter)
    for words in (r"model.layers.1.self_attn.v_proj.weight", "weights are not those of base and adapter", "the budget of bf16 is"):
        assert words in caught.value.message


def test_an_expert_that_was_not_merged_fails(bases, tmp_path):
    base = bases["mixtral"]
    expert = "model.layers.0.block_sparse_moe.experts.3.w2"
    tensors = {f"base_model.model.{expert}.lora_A.weight": torch.randn(4, 96) * 0.1}
    tensors[f"base_model.model.{expert}.lora_B.weight"] = torch.randn(48, 4) * LARGE_STD
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    merged = shutil.copytree(base, tmp_path / "merged")
    assert any("logits differ" in text for text in _logit_failures(base, merged, tmp_path / "adapter"))
    with pytest.raises(NotTheSameModelError, match=r"experts\.3\.w2"):
        _gate(base, merged, tmp_path / "adapter")

    a, b = (tensors[f"base_model.model.{expert}.lora_{half}.weight"] for half in "AB")

    def add(values: dict[str, torch.Tensor]) -> None:
        values[f"{expert}.weight"] = (values[f"{expert}.weight"].float() + 2 * b @ a).to(torch.bfloat16)

    _change(merged, add)
    assert _gate(base, merged, tmp_path / "adapter").failures == ()


def test_a_configuration_that_changes_what_the_weights_mean_fails(bases, tmp_path):
    adapter = _adapter(bases["llama"], tmp_path / "adapter")
    merged = _merged(bases["llama"], adapter, tmp_path / "merged")
    config = json.loads((merged / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (merged / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotTheSameModelError, match="logits differ at most by") as caught:
        _gate(bases["llama"], merged, adapter)
    assert "weights are not those" not in caught.value.message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_fail(bases, value, tmp_path):
    adapter = _adapter(bases["llama"], tmp_path / "adapter")
    merged = _merged(bases["llama"], adapter, tmp_path / "merged")
    _change(merged, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][3].fill_(value))
    with pytest.raises(NotTheSameModelError, match="NaN or Inf among the logits"):
        _gate(bases["llama"], merged, adapter)


def test_a_missing_tensor_fails_by_name(bases):
    exact = FolderWeights(bases["llama"])
    less = FolderWeights(bases["llama"])
    less.shapes = {name: shape for name, shape in less.shapes.items() if name != "model.norm.weight"}
    for left, right in ((exact, less), (less, exact)):
        assert check_weights(left, right, plain=left, dtype=torch.bfloat16).wrong_tensors == ("model.norm.weight",)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_half_a_unit_is_what_rounding_to_the_nearest_may_be_off_by(dtype):
    torch.manual_seed(0)
    values = torch.cat(
        (torch.randn(50_000), torch.randn(50_000) * 1e-3, torch.randn(50_000) * 1e-7 if dtype != torch.float32 else torch.randn(9))
    )
    bound = half_unit(values, dtype=dtype)
    error = (values.to(dtype).double() - values.double()).abs()
    assert (error <= bound.double()).all()
    if dtype != torch.float32:
        assert (error > 0.9 * bound.double()).float().mean() > 0.05


def test_a_ceiling_makes_a_yardstick_that_is_too_far_off_an_error(bases, tmp_path):
    adapter = _adapter(bases["llama"], tmp_path / "adapter")
    report = _gate(bases["llama"], _merged(bases["llama"], adapter, tmp_path / "merged"), adapter)
    assert report.yardstick is not None
    failing = replace(report, ceiling_rms=report.yardstick.rms / 2)
    assert "rounding to bf16 alone moves logits by" in failing.failures[0]


def test_greedy_continuations_are_those_of_generate(bases):
    model = StreamedModel(bases["llama"])
    found = continue_greedily(model, SEQUENCES, num_prompts=3, num_prompt_tokens=6, num_tokens=7, max_walks=7)
    whole = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
    assert len(found) == 3
    for item in found:
        prompt = torch.tensor([item.token_ids[: item.num_prompt]])
        wanted = cast("Any", whole).generate(prompt, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert list(item.token_ids) == wanted[0].tolist()


def test_a_walk_settles_at_least_one_token_and_a_right_guess_all(bases):
    model = StreamedModel(bases["llama"])
    few = continue_greedily(model, SEQUENCES, num_prompts=2, num_prompt_tokens=6, num_tokens=7, max_walks=2)
    assert all(len(item.token_ids) - item.num_prompt >= 2 for item in few)
    whole = continue_greedily(model, SEQUENCES, num_prompts=1, num_prompt_tokens=6, num_tokens=7, max_walks=7)
    again = continue_greedily(model, [whole[0].token_ids], num_prompts=1, num_prompt_tokens=6, num_tokens=7, max_walks=1)
    assert again == whole


def test_a_report_tells_other_tokens_of_continuations_and_ties(bases, tmp_path):
    adapter = _adapter(bases["llama"], tmp_path / "adapter")
    report = _gate(bases["llama"], _merged(bases["llama"], adapter, tmp_path / "merged"), adapter)
    assert report.greedy.num_prompts == 4
    assert report.greedy.num_tokens == 32
    assert report.greedy.num_different == 0
    assert report.greedy.num_ties < 16
    with pytest.raises(NotTheSameModelError, match=r"tokens of greedy continuations differ") as caught:
        _gate(bases["llama"], shutil.copytree(bases["llama"], tmp_path / "unmerged"), adapter)
    assert caught.value.report is not None
    assert caught.value.report.greedy.num_different > 8


def test_perplexity_is_that_of_transformers(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["gemma3"], dtype=torch.float32)
    nats = num_tokens = 0
    for ids in SEQUENCES:
        with torch.no_grad():
            nats += model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
        num_tokens += len(ids) - 1
    assert perplexity(StreamedModel(bases["gemma3"]), SEQUENCES) == pytest.approx(math.exp(nats / num_tokens), rel=1e-5)


def test_differences_are_those_of_whole_logits(bases, tmp_path):
    adapter = _adapter(bases["qwen3"], tmp_path / "adapter")
    merged = _merged(bases["qwen3"], adapter, tmp_path / "merged")
    report = compare(StreamedModel(bases["qwen3"]), StreamedModel(merged), type_="other", sequences=SEQUENCES)
    both = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (bases["qwen3"], merged)]
    texts = [*SEQUENCES, *(item.token_ids for item in _continuations(bases["qwen3"]))]
    with torch.no_grad():
        reference, other = (torch.cat([model(torch.tensor([ids])).logits[0] for ids in texts]).double() for model in both)
    kl = (reference.softmax(-1) * (reference.log_softmax(-1) - other.log_softmax(-1))).sum(-1)
    got = report.difference
    assert got.num_positions == len(reference)
    assert got.max_abs == pytest.approx((reference - other).abs().max().item(), rel=1e-4)
    assert got.mean_abs == pytest.approx((reference - other).abs().mean().item(), rel=1e-4)
    assert got.rms == pytest.approx((reference - other).square().mean().sqrt().item(), rel=1e-4)
    assert got.mean_kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert got.max_kl == pytest.approx(kl.max().item(), rel=1e-4)
    assert got.top1 == pytest.approx((reference.argmax(-1) == other.argmax(-1)).double().mean().item())
    assert report.spread == pytest.approx(reference.var(-1, correction=0).mean().sqrt().item(), rel=1e-4)


def _continuations(folder: Path):
    return continue_greedily(StreamedModel(folder), SEQUENCES, num_prompts=4, num_prompt_tokens=8, num_tokens=8, max_walks=8)


def test_the_report_goes_into_a_manifest_as_json(bases, tmp_path):
    adapter = _adapter(bases["llama"], tmp_path / "adapter")
    shares: list[float] = []
    report = check_conversion(
        bases["llama"],
        _merged(bases["llama"], adapter, tmp_path / "merged"),
        adapter_dir=adapter,
        dtype=torch.bfloat16,
        type_="bf16",
        sequences=SEQUENCES,
        on_progress=shares.append,
    )
    metadata = json.loads(json.dumps(report.to_metadata(), allow_nan=False))
    assert metadata["type"] == "bf16"
    assert set(metadata["perplexity"]) == {"base", "adapter", "converted"}
    assert metadata["perplexity"]["adapter"] == pytest.approx(metadata["perplexity"]["converted"], rel=0.1)
    assert metadata["difference"]["rms"] <= metadata["budget_rms"]
    assert metadata["weights"]["num_wrong"] == 0
    assert "lossy_budget" not in metadata
    assert shares == sorted(shares)
    assert shares[-1] <= 1.0


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Wide enough for blocks of 128 by 128."""
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True}
    torch.manual_seed(9)
    model = LlamaForCausalLM(LlamaConfig(**{**_SMALL, **sizes}))
    folder = tmp_path_factory.mktemp("wide")
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    return folder


def _quantized(base: Path, adapter: Path | None, out: Path, *, form: str, **how) -> MergePlan:
    out.mkdir(exist_ok=True)
    plan = plan_merge(base, adapter, stored_as=torch.bfloat16, form=form, **how)
    merge(plan, out, on_progress=lambda share: None)
    return plan


@pytest.mark.parametrize("std", [0.0, SMALL_STD, LARGE_STD])
@pytest.mark.parametrize("form", ["nf4", "fp8", "fp8_block"])
def test_a_right_quantized_merge_passes(wide, form, std, tmp_path):
    adapter = _adapter(wide, tmp_path / "adapter", std=std)
    _quantized(wide, adapter, tmp_path / "out", form=form)
    report = _gate(wide, tmp_path / "out", adapter, form=form)
    assert report.weights is not None
    assert report.weights.num_rounded_otherwise < 1e-4 * report.weights.num_weights
    assert report.yardstick is not None
    assert 0 < report.difference.rms <= 1.1 * report.yardstick.rms
    assert report.to_metadata()["lossy_budget"] == {"max_mean_kl": LOSSY[form].max_mean_kl, "min_top1": LOSSY[form].min_top1}


@pytest.mark.parametrize("std", [SMALL_STD, LARGE_STD])
@pytest.mark.parametrize("form", ["nf4", "fp8", "fp8_block"])
@pytest.mark.parametrize("fault", ["left_out", "double_scale"])
def test_a_wrong_quantized_merge_fails(wide, form, std, fault, tmp_path):
    adapter = _adapter(wide, tmp_path / "adapter0", std=std)
    {"left_out": _left_out, "double_scale": _double_scale}[fault](wide, adapter, tmp_path)
    _quantized(wide, tmp_path / "adapter", tmp_path / "out", form=form)
    with pytest.raises(NotTheSameModelError, match="weights are not those of base and adapter") as caught:
        _gate(wide, tmp_path / "out", adapter, form=form)
    assert caught.value.report is not None
    assert caught.value.report.weights is not None
    assert len(caught.value.report.weights.wrong_tensors) == (1 if fault == "left_out" else 14)


@pytest.mark.parametrize("base_weights", ["trained", "original"])
def test_a_merge_onto_the_weights_of_nf4_training_is_held_to_these(wide, base_weights, tmp_path):
    adapter = _adapter(wide, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    plan = plan_merge(wide, adapter, stored_as=torch.bfloat16, trained_on="nf4", base_weights=base_weights)
    merge(plan, tmp_path / "out", on_progress=lambda share: None)
    weights = TensorWeights(plan.shards.values())
    assert _gate(wide, tmp_path / "out", adapter, base_weights=weights).failures == ()
    if base_weights == "trained":
        with pytest.raises(NotTheSameModelError, match="weights are not those"):
            _gate(wide, tmp_path / "out", adapter)


def test_an_adapter_on_a_base_that_is_stored_as_nf4_is_compared_with_its_dequantized_weights(wide, tmp_path):
    adapter = _adapter(wide, tmp_path / "adapter")
    _quantized(wide, None, tmp_path / "base", form="nf4")
    (tmp_path / "out").mkdir()
    merge(plan_merge(tmp_path / "base", adapter, stored_as=torch.bfloat16), tmp_path / "out", on_progress=lambda share: None)
    assert _gate(tmp_path / "base", tmp_path / "out", adapter).failures == ()


def test_a_type_that_costs_more_than_it_may_fails(bases, tmp_path):
    base = StreamedModel(bases["llama"])
    close = StreamedModel(bases["llama"], weights=RoundedWeights(FolderWeights(bases["llama"]), dtype=torch.float16))
    assert compare(base, close, type_="q8_0", sequences=SEQUENCES).check().lossy_budget == LOSSY["q8_0"]
    other = StreamedModel(_base("llama", tmp_path, seed=8))
    with pytest.raises(NotTheSameModelError, match=r"KL divergence is .* nats, the budget is .*; .*% of most probable tokens agree"):
        compare(base, other, type_="q8_0", sequences=SEQUENCES).check()
    budget = LOSSY["q8_0"]
    assert len(budget.failures(mean_kl=math.nan, top1=math.nan)) == 2
    assert budget.failures(mean_kl=0.01, top1=0.5) == ("50.0% of most probable tokens agree, the budget is 86%",)
    assert budget.failures(mean_kl=0.002, top1=0.5) == ()


def _dataset(folder: Path, rows: list[list[int]], *, prefix: str = "", name: str = "shard-00000.safetensors") -> None:
    lengths = [len(row) for row in rows]
    tensors = {
        f"{prefix}input_ids": np.concatenate(rows).astype(np.int32),
        f"{prefix}label_mask": np.ones(sum(lengths), dtype=np.uint8),
        f"{prefix}row_offsets": np.cumsum([0, *lengths]),
    }
    (folder / name).write_bytes(safetensors.numpy.save(tensors))


def test_rows_of_a_dataset_are_spread_over_its_shards(tmp_path):
    _dataset(tmp_path, [[row, row + 1, row + 2, row + 3] for row in range(10)])
    _dataset(tmp_path, [[row, row + 1] for row in range(100, 110)], name="shard-00001.safetensors")
    found = dataset_rows(tmp_path, vocab_size=320, max_tokens=12, row_tokens=3)
    assert found.sequences == ((0, 1, 2), (5, 6, 7), (100, 101), (105, 106))
    assert found.num_tokens == 10
    many = dataset_rows(tmp_path, vocab_size=320, max_tokens=40)
    assert many.num_tokens > 20, "rows are shorter than they may be, and all the more are taken"
    (tmp_path / "pairs").mkdir()
    _dataset(tmp_path / "pairs", [[7, 8, 9]], prefix="chosen_")
    assert dataset_rows(tmp_path / "pairs", vocab_size=320, max_tokens=100).sequences == ((7, 8, 9),)


def test_a_dataset_of_another_form_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="has no rows"):
        dataset_rows(tmp_path, vocab_size=320, max_tokens=10)
    _dataset(tmp_path, [[1, 2, 400]])
    with pytest.raises(InvalidArgumentError, match="got 1 to 400, wanted ids below 320"):
        dataset_rows(tmp_path, vocab_size=320, max_tokens=10)
    (tmp_path / "shard-00000.safetensors").write_bytes(safetensors.numpy.save({"ids": np.zeros(3, dtype=np.int32)}))
    with pytest.raises(InvalidArgumentError, match="prepare the dataset again"):
        dataset_rows(tmp_path, vocab_size=320, max_tokens=10)


def test_passages_are_the_same_each_time_and_arbitrary_ids_stand_in_for_a_tokenizer(base_model_dir, tmp_path):
    found = passages(base_model_dir, vocab_size=49_152)
    assert found == passages(base_model_dir, vocab_size=49_152)
    assert found.source == "passages"
    assert len(found.sequences) == len(PASSAGES)
    assert 300 < found.num_tokens <= 384
    (tmp_path / "tokenizer.json").write_text("{}")
    without = passages(tmp_path, vocab_size=320)
    assert without == arbitrary(vocab_size=320)
    assert without.source == "arbitrary"


@pytest.mark.slow
@pytest.mark.parametrize("std", [SMALL_STD, 0.05])
def test_smollm2_passes_and_fails_as_it_should(base_model_dir, std, tmp_path):
    sequences = passages(base_model_dir, vocab_size=49_152).sequences
    adapter = _adapter(base_model_dir, tmp_path / "adapter", std=std)
    merged = _merged(base_model_dir, adapter, tmp_path / "merged")
    arguments = {"adapter_dir": adapter, "dtype": torch.bfloat16, "type_": "bf16", "sequences": sequences}
    report = check_conversion(base_model_dir, merged, **arguments)
    assert report.greedy.num_different == 0
    assert 20 < report.perplexity["base"] < 400

    _left_out(base_model_dir, adapter, tmp_path / "wrong")
    with pytest.raises(NotTheSameModelError, match=r"in 1 tensors such as model\.layers\.1\.self_attn\.v_proj\.weight"):
        check_conversion(base_model_dir, tmp_path / "wrong" / "merged", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_what_a_form_costs_smollm2_is_within_its_budget(base_model_dir, form, tmp_path):
    adapter = _adapter(base_model_dir, tmp_path / "adapter", std=0.05)
    _quantized(base_model_dir, adapter, tmp_path / "out", form=form)
    report = check_conversion(
        base_model_dir,
        tmp_path / "out",
        adapter_dir=adapter,
        dtype=torch.bfloat16,
        type_=form,
        sequences=passages(base_model_dir, vocab_size=49_152).sequences,
    )
    assert report.weights is not None
    assert report.weights.num_rounded_otherwise < 1e-4 * report.weights.num_weights
    assert report.difference.mean_kl > 0.2 * LOSSY[form].max_mean_kl
