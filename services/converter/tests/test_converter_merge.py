"""The merge against PEFT and transformers, on a small random model and on SmolLM2."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel

from finery_common.errors import FailedPreconditionError, InvalidArgumentError, UnimplementedError
from finery_converter.merge import merge, plan_merge
from finery_converter.tensorfiles import read_header

TOKENS = torch.arange(3, 35).reshape(2, 16)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def _merged(base: Path, adapter: Path | None, out: Path, *, stored_as: torch.dtype = torch.bfloat16, **how) -> Path:
    out.mkdir()
    merge(plan_merge(base, adapter, stored_as=stored_as, **how), out, on_progress=lambda share: None)
    return out


def _is_near(out: Path, exact: dict[str, torch.Tensor]) -> None:
    """Every tensor of `out` is `exact` but for float32's rounding."""
    for name, tensor in load_file(out / "model.safetensors").items():
        assert (tensor.double() - exact[name]).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact[name].abs().max()


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.double()


def _copy_adapter(adapter: Path, out: Path, *, change=None, config=None) -> Path:
    shutil.copytree(adapter, out)
    if change is not None:
        tensors = load_file(out / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    if config is not None:
        content = json.loads((out / "adapter_config.json").read_text()) | config
        (out / "adapter_config.json").write_text(json.dumps(content))
    return out


@pytest.fixture(scope="module")
def base(make_base) -> Path:
    return make_base()


@pytest.fixture(scope="module")
def adapter(base, make_adapter) -> Path:
    return make_adapter(base)


@pytest.mark.parametrize("type_", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_merged_logits_are_as_near_to_fp64_as_rounding_the_exact_merge_allows(
    make_base, make_adapter, adapter_on_base, tmp_path, type_, tied, use_rslora
):
    base = make_base(tied=tied)
    adapter = make_adapter(base, use_rslora=use_rslora)
    reference = adapter_on_base(base, adapter)
    expected = _logits(reference)
    without_adapter = _logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64))
    rounded_once = reference.merge_and_unload().to(DTYPES[type_]).to(torch.float64)
    budget = (_logits(rounded_once) - expected).abs().max()

    out = _merged(base, adapter, tmp_path / "out", stored_as=DTYPES[type_])
    error = (_logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)) - expected).abs().max()

    assert (without_adapter - expected).abs().max() > 20 * budget
    assert error <= 1.1 * budget


def test_a_float32_merge_differs_from_peft_only_by_float32_rounding(base, adapter, adapter_on_base, tmp_path):
    out = _merged(base, adapter, tmp_path / "out", stored_as=torch.float32)
    _is_near(out, adapter_on_base(base, adapter).merge_and_unload().state_dict())


def test_biases_that_were_trained_replace_those_of_the_base(make_base, make_adapter, adapter_on_base, tmp_path):
    base = make_base(bias=True)
    adapter = make_adapter(base, bias="all")
    out = _merged(base, adapter, tmp_path / "out", stored_as=torch.float32)
    expected = _logits(adapter_on_base(base, adapter))
    assert torch.allclose(_logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)), expected, atol=1e-5)
    assert "model.layers.0.self_attn.q_proj.bias" in plan_merge(base, adapter, stored_as=torch.float32, fits=torch.float32).updates


def test_a_sharded_base_gives_the_same_shards_and_an_index_that_loads(make_base, make_adapter, tmp_path):
    whole, sharded = make_base(dtype=torch.bfloat16), make_base(dtype=torch.bfloat16, max_shard_size="60KB")
    adapter = make_adapter(whole)
    single = _merged(whole, adapter, tmp_path / "single")
    many = _merged(sharded, adapter, tmp_path / "many")
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(path.name for path in many.glob("*.safetensors")) == names
    index = json.loads((many / "model.safetensors.index.json").read_text())
    before = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == before["weight_map"]
    tensors = {name: tensor for shard in names for name, tensor in load_file(many / shard).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in load_file(single / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name])
    loaded = AutoModelForCausalLM.from_pretrained(many, dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_everything_but_weights_and_dtype_is_taken_over_byte_for_byte_and_code_is_not(base, adapter, tmp_path):
    out = _merged(base, adapter, tmp_path / "out", stored_as=torch.float16)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()} - {"code.py"}
    config, before = json.loads((out / "config.json").read_text()), json.loads((base / "config.json").read_text())
    assert config == {**before, "dtype": "float16"}
    GenerationConfig.from_pretrained(out).validate(strict=True)


def test_tied_embeddings_stay_tied(base, adapter, tmp_path):
    out = _merged(base, adapter, tmp_path / "out")
    assert "lm_head.weight" not in read_header(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_tensors_that_are_no_floats_are_copied(base, adapter, tmp_path):
    changed = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors") | {"steps": torch.tensor([1, 2, 3]), "nothing": torch.empty(0, 4)}
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    out = _merged(changed, adapter, tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    assert merged["steps"].tolist() == [1, 2, 3]
    assert merged["nothing"].shape == (0, 4)


def test_an_adapter_key_that_matches_nothing_is_an_error(base, adapter, tmp_path):
    def rename(tensors):
        for half in ("A", "B"):
            name = f"base_model.model.model.layers.1.mlp.up_proj.lora_{half}.weight"
            tensors[name.replace("up_proj", "experts.0.up_proj")] = tensors.pop(name)

    changed = _copy_adapter(adapter, tmp_path / "adapter", change=rename)
    with pytest.raises(InvalidArgumentError, match=r"2 of 28 .*experts\.0\.up_proj") as caught:
        plan_merge(base, changed, stored_as=torch.bfloat16, fits=torch.bfloat16)
    assert caught.value.code == "unmatched_adapter_tensor"


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_a_pair_is_an_error(base, adapter, tmp_path, half):
    name = f"base_model.model.model.layers.0.mlp.up_proj.lora_{half}.weight"
    changed = _copy_adapter(adapter, tmp_path / "adapter", change=lambda tensors: tensors.pop(name))
    with pytest.raises(InvalidArgumentError) as caught:
        plan_merge(base, changed, stored_as=torch.bfloat16, fits=torch.bfloat16)
    assert caught.value.code == "unmatched_adapter_tensor"


def test_an_adapter_of_tied_embeddings_is_refused(make_base, make_adapter, base, tmp_path):
    adapter = make_adapter(make_base(tied=False), target_modules=["lm_head", "q_proj"])
    with pytest.raises(InvalidArgumentError, match="lm_head"):
        plan_merge(base, adapter, stored_as=torch.bfloat16, fits=torch.bfloat16)


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_shape_off_by_one_is_an_error(base, adapter, tmp_path, half):
    name = f"base_model.model.model.layers.0.mlp.up_proj.lora_{half}.weight"

    def grow(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    changed = _copy_adapter(adapter, tmp_path / "adapter", change=grow)
    with pytest.raises(InvalidArgumentError) as caught:
        plan_merge(base, changed, stored_as=torch.bfloat16, fits=torch.bfloat16)
    assert caught.value.code == "adapter_shape_mismatch"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["adapter", "base"])
def test_nan_and_inf_are_errors_that_name_the_tensor(base, adapter, tmp_path, value, where):
    def spoil(tensors):
        name = next(name for name in tensors if "layers.1.mlp.down_proj" in name)
        tensors[name][0, 0] = value

    if where == "adapter":
        adapter = _copy_adapter(adapter, tmp_path / "adapter", change=spoil)
    else:
        base = shutil.copytree(base, tmp_path / "base")
        tensors = load_file(base / "model.safetensors")
        spoil(tensors)
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidArgumentError, match=rf"down_proj.* of the {where}.* NaN or Inf"):
        _merged(base, adapter, tmp_path / "out")


def test_a_value_that_f16_cannot_hold_is_an_error_also_on_the_way_to_an_f16_gguf(base, adapter, tmp_path):
    base = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][3, 5] = 70_000.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for number, stored_as in enumerate((torch.float16, torch.float32)):
        with pytest.raises(InvalidArgumentError, match=r"k_proj.* 7e\+04, more than float16"):
            _merged(base, adapter, tmp_path / f"out{number}", stored_as=stored_as, fits=torch.float16)
    _merged(base, adapter, tmp_path / "bf16")


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"},
        {"use_dora": True, "fan_in_fan_out": True},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"layer_replication": [[0, 2]]},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"trainable_token_indices": [1, 2]},
    ],
)
def test_kinds_of_adapter_that_would_merge_wrongly_are_refused(base, adapter, tmp_path, config):
    changed = _copy_adapter(adapter, tmp_path / "adapter", config=config)
    with pytest.raises(UnimplementedError, match=next(iter(config))):
        plan_merge(base, changed, stored_as=torch.bfloat16, fits=torch.bfloat16)


@pytest.mark.parametrize("num_bytes", [0, 5, 100, 20_000])
def test_a_base_cut_off_anywhere_is_an_error(base, adapter, tmp_path, num_bytes):
    cut = shutil.copytree(base, tmp_path / "base")
    (cut / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:num_bytes])
    with pytest.raises(InvalidArgumentError, match="cut off|not a safetensors file"):
        plan_merge(cut, adapter, stored_as=torch.bfloat16, fits=torch.bfloat16)


def test_a_base_without_weights_or_quantized_is_refused(base, adapter, tmp_path):
    empty = shutil.copytree(base, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(FailedPreconditionError, match=r"has no model\.safetensors"):
        plan_merge(empty, adapter, stored_as=torch.bfloat16, fits=torch.bfloat16)
    (empty / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(UnimplementedError, match="quantized"):
        plan_merge(empty, adapter, stored_as=torch.bfloat16, fits=torch.bfloat16)


def test_ranks_and_alphas_by_pattern_are_those_of_peft(base, make_adapter, adapter_on_base, tmp_path):
    adapter = make_adapter(
        base,
        rank_pattern={"q_proj": 8, r"^model.layers.1.mlp.up_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 32, "down_proj": 1},
        use_rslora=True,
    )
    exact = adapter_on_base(base, adapter).merge_and_unload().state_dict()
    _is_near(_merged(base, adapter, tmp_path / "out", stored_as=torch.float32), exact)


def test_a_rank_that_the_patterns_do_not_speak_of_is_an_error(base, adapter, tmp_path):
    changed = _copy_adapter(adapter, tmp_path / "adapter", config={"rank_pattern": {"q_proj": 8}})
    with pytest.raises(InvalidArgumentError, match=r"rank 8 on model\.layers\.0\.self_attn\.q_proj") as caught:
        plan_merge(base, changed, stored_as=torch.bfloat16)
    assert caught.value.code == "adapter_shape_mismatch"


@pytest.mark.parametrize("save_embedding_layers", [True, False])
def test_lora_on_embeddings_and_head_is_merged(make_base, make_adapter, adapter_on_base, tmp_path, save_embedding_layers):
    base = make_base(tied=False)
    adapter = make_adapter(base, target_modules=["embed_tokens", "lm_head", "q_proj"], save_embedding_layers=save_embedding_layers)
    exact = adapter_on_base(base, adapter).merge_and_unload().state_dict()
    _is_near(_merged(base, adapter, tmp_path / "out", stored_as=torch.float32), exact)
    assert (exact["model.embed_tokens.weight"] - load_file(base / "model.safetensors")["model.embed_tokens.weight"]).abs().max() > 0.01


def test_modules_that_were_trained_whole_replace_those_of_the_base(make_base, make_adapter, adapter_on_base, tmp_path):
    base = make_base(tied=False)
    adapter = make_adapter(base, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    exact = adapter_on_base(base, adapter).merge_and_unload().state_dict()
    out = _merged(base, adapter, tmp_path / "out", stored_as=torch.float32)
    _is_near(out, exact)
    before = load_file(base / "model.safetensors")
    assert not torch.equal(load_file(out / "model.safetensors")["lm_head.weight"], before["lm_head.weight"])


def test_modules_that_the_configuration_saves_and_the_file_lacks_are_an_error(base, adapter, tmp_path):
    changed = _copy_adapter(adapter, tmp_path / "adapter", config={"modules_to_save": ["norm"]})
    with pytest.raises(InvalidArgumentError, match="lacks the tensors of 1 modules .* norm"):
        plan_merge(base, changed, stored_as=torch.bfloat16)


def test_a_pair_that_was_lost_is_an_error(base, make_adapter, tmp_path):
    adapter = make_adapter(base, target_modules=["q_proj", "up_proj"])

    def lose(tensors):
        for half in "AB":
            del tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{half}.weight"]

    changed = _copy_adapter(adapter, tmp_path / "adapter", change=lose)
    with pytest.raises(InvalidArgumentError, match=r"lacks the tensors of 1 modules .* model\.layers\.1\.mlp\.up_proj") as caught:
        plan_merge(base, changed, stored_as=torch.bfloat16)
    assert caught.value.code == "missing_adapter_tensor"


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], r".*\.(q_proj|up_proj)"])
def test_a_kind_of_module_that_was_lost_is_an_error(base, make_adapter, tmp_path, targets):
    adapter = make_adapter(base, target_modules=targets)
    plan_merge(base, adapter, stored_as=torch.bfloat16)

    def lose(tensors):
        for name in [name for name in tensors if "up_proj" in name]:
            del tensors[name]

    changed = _copy_adapter(adapter, tmp_path / "adapter", change=lose)
    with pytest.raises(InvalidArgumentError, match=r"lacks the tensors of 2 modules .* model\.layers\.0\.mlp\.up_proj") as caught:
        plan_merge(base, changed, stored_as=torch.bfloat16)
    assert caught.value.code == "missing_adapter_tensor"


def test_an_adapter_of_some_layers_only_is_no_error(base, make_adapter, adapter_on_base, tmp_path):
    adapter = make_adapter(base, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    exact = adapter_on_base(base, adapter).merge_and_unload().state_dict()
    _is_near(_merged(base, adapter, tmp_path / "out", stored_as=torch.float32), exact)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["c_attn", "lm_head"]])
def test_weights_that_are_stored_transposed_get_a_transposed_update(make_adapter, adapter_on_base, tmp_path, targets):
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=48, n_layer=2, n_head=4, tie_word_embeddings=False)
    torch.manual_seed(3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", target_modules=targets, fan_in_fan_out=True)
    exact = adapter_on_base(tmp_path / "base", adapter).merge_and_unload().state_dict()
    _is_near(_merged(tmp_path / "base", adapter, tmp_path / "out", stored_as=torch.float32), exact)


def test_dora_is_merged_exactly(base, make_adapter, adapter_on_base, tmp_path):
    adapter = make_adapter(base, use_dora=True, use_rslora=True)
    expected = _logits(adapter_on_base(base, adapter))
    out = _merged(base, adapter, tmp_path / "out", stored_as=torch.float32)
    assert torch.allclose(_logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)), expected, atol=1e-5)
    _is_near(out, adapter_on_base(base, adapter).merge_and_unload().state_dict())


@pytest.mark.parametrize("shape", [None, (95,)])
def test_dora_without_a_magnitude_for_each_row_is_an_error(base, make_adapter, tmp_path, shape):
    def spoil(tensors):
        name = next(name for name in tensors if "layers.1.mlp.up_proj.lora_magnitude_vector" in name)
        tensors.pop(name) if shape is None else tensors.update({name: torch.ones(shape)})

    changed = _copy_adapter(make_adapter(base, use_dora=True), tmp_path / "adapter", change=spoil)
    with pytest.raises(InvalidArgumentError, match=r"magnitude_vector.*up_proj"):
        plan_merge(base, changed, stored_as=torch.bfloat16)


def test_a_model_without_an_adapter_only_changes_its_type(base, tmp_path):
    out = _merged(base, None, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert list(before) == list(after)
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in before)
    same = _merged(out, None, tmp_path / "same")
    assert (same / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_shards_are_cut_at_the_size_wanted_and_load(base, adapter, tmp_path):
    whole = load_file(_merged(base, adapter, tmp_path / "whole") / "model.safetensors")
    most_bytes = max(tensor.nbytes for tensor in whole.values()) + 500
    with pytest.raises(InvalidArgumentError, match=r"max_file_size_bytes: got 1,000, but \S+ alone takes [0-9,]+; allow at least that"):
        plan_merge(base, adapter, stored_as=torch.bfloat16, max_shard_bytes=1000)
    out = _merged(base, adapter, tmp_path / "out", max_shard_bytes=most_bytes)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert files == sorted(path.name for path in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    shards = {file: load_file(out / file) for file in files}
    assert len(files) > 1
    assert all((out / file).stat().st_size <= most_bytes for file in files)
    assert {name: file for file, tensors in shards.items() for name in tensors} == index["weight_map"]
    for name, tensor in whole.items():
        assert torch.equal(shards[index["weight_map"][name]][name], tensor)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_size_bytes_is_that_of_the_files(base, adapter, tmp_path):
    plan = plan_merge(base, adapter, stored_as=torch.bfloat16)
    out = _merged(base, adapter, tmp_path / "out")
    written = sum(path.stat().st_size for path in out.iterdir())
    assert written - 10_000 < plan.size_bytes < written


def test_a_disk_that_fails_while_writing_ends_the_merge(base, adapter, tmp_path, monkeypatch):
    def full(fd, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        _merged(base, adapter, tmp_path / "out")


@pytest.mark.slow
def test_smollm2_merges_within_256_mib_beside_the_interpreter(base_model_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_model_dir, r=16, lora_alpha=16)
    (tmp_path / "out").mkdir()
    program = (
        "import re, sys, torch; from pathlib import Path; from finery_converter.merge import merge, plan_merge\n"
        "base, adapter, out = map(Path, sys.argv[1:])\n"
        "rss = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "torch.set_num_threads(1); before = rss()\n"
        "merge(plan_merge(base, adapter, stored_as=torch.bfloat16, fits=torch.bfloat16), out, on_progress=lambda share: None)\n"
        "print(rss() - before)"
    )
    command = [sys.executable, "-c", program, str(base_model_dir), str(adapter), str(tmp_path / "out")]
    extra_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert extra_kib < 256 * 1024
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 250e6
