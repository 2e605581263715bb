"""NF4 and FP8, in and out: against bitsandbytes bit by bit, and opened by transformers and vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from finery_common.errors import InvalidArgumentError, UnimplementedError
from finery_converter import nf4
from finery_converter.merge import merge, plan_merge
from finery_converter.stored import FP8, fp8_scales

TOKENS = torch.arange(3, 35).reshape(2, 16)
# Right engines round activations differently, and each answer errs by another amount: by a quarter more or less, over all of these by 3 %.
PROMPTS = torch.randint(3, 320, (64, 16), generator=torch.Generator().manual_seed(6))
CHECKOUT = Path(__file__).resolve().parents[3]
NF4_CONFIG = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Wide enough for blocks of 128 by 128, several of them in rows and columns."""
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(5)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        # Rows of unlike size, as trained models have them.
        parameter.data *= torch.rand(parameter.shape[0], *[1] * (parameter.dim() - 1)) * 2 + 0.5
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def adapter(base, make_adapter) -> Path:
    return make_adapter(base, r=8, lora_alpha=16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 128 rows, so that small tensors have several."""
    monkeypatch.setattr("finery_converter.tensorfiles.BLOCK_BYTES", 1)
    monkeypatch.setattr("finery_converter.base_tensors._CHUNK_ELEMENTS", 128 * 64)
    monkeypatch.setattr("finery_converter.stored._CHUNK_ELEMENTS", 128 * 64)


def _written(base: Path, adapter: Path | None, out: Path, **how) -> Path:
    out.mkdir()
    merge(plan_merge(base, adapter, **{"stored_as": torch.bfloat16, **how}), out, on_progress=lambda share: None)
    return out


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens.to(next(model.parameters()).device)).logits.double().cpu()


def _linear(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.fixture(scope="module")
def nf4_model(base):
    """The base as a trainer has it: quantized by transformers and bitsandbytes on load."""
    config = BitsAndBytesConfig(**NF4_CONFIG, bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def nf4_base(nf4_model, base, tmp_path_factory) -> Path:
    """The same as transformers saves it."""
    folder = tmp_path_factory.mktemp("nf4")
    nf4_model.save_pretrained(folder, max_shard_size="300KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _dequantized(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit) and isinstance(module.weight, Params4bit)
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(192, 640), (64, 64), (1000, 70), (7, 13), (3, 64)])
def test_quantizing_in_parts_is_bit_equal_to_bitsandbytes_on_the_whole(dtype, shape):
    torch.manual_seed(sum(shape))
    values = torch.randn(shape) * torch.rand(shape[0], 1)
    values[0] = 0
    packed, state = functional.quantize_4bit(values.to(dtype), compress_statistics=True, quant_type="nf4")
    parts = values.to(dtype).float().reshape(-1).split(128)
    absmax = [nf4.block_absmax(part) for part in parts]
    codes = torch.cat([nf4.codes(part, absmax_B, arithmetic="cpu") for part, absmax_B in zip(parts, absmax, strict=True)])
    scales = nf4.nest(torch.cat(absmax), arithmetic="cpu")
    assert state.state2 is not None
    assert torch.equal(nf4.pack(codes), packed.view(-1))
    assert torch.equal(scales.codes_B, state.absmax)
    assert torch.equal(scales.nested_absmax_C, state.state2.absmax)
    assert torch.equal(scales.offset, state.offset)
    assert torch.equal(nf4.code_256(), state.state2.code)
    dequantized = nf4.dequantized(packed, scales.scales(), num_elements=values.numel(), dtype=dtype).view(shape)
    assert torch.equal(dequantized, functional.dequantize_4bit(packed, state))


def test_codes_are_counted_right_next_to_every_border():
    middles = (nf4.code_16()[:-1] + nf4.code_16()[1:]) / 2
    borders = torch.cat((middles, torch.arange(33) / 16 - 1))
    values = torch.cat(
        [borders, *(torch.nextafter(borders, torch.full_like(borders, side)) for side in (-9.0, 9.0)), torch.rand(9999) * 2 - 1]
    )
    values = values.clamp(-1, 1)
    values[0] = 1.0
    one = torch.ones(values.numel()).split(64)
    found = torch.cat([nf4.codes(part, full[:1], arithmetic="gpu") for part, full in zip(values.split(64), one, strict=True)])
    assert torch.equal(found.long(), torch.bucketize(values, middles))


def test_scales_are_the_nearest_on_a_gpu():
    torch.manual_seed(2)
    absmax_B = torch.rand(20_000) + 0.1
    scales = nf4.nest(absmax_B, arithmetic="gpu")
    normed = torch.cat([part / part.abs().max() for part in (absmax_B - absmax_B.mean()).split(256)])
    nearest = (normed.unsqueeze(1) - nf4.code_256()).abs().argmin(1)
    assert torch.equal(scales.codes_B.long(), nearest)
    assert not torch.equal(scales.codes_B, nf4.nest(absmax_B, arithmetic="cpu").codes_B)


def test_an_adapter_trained_on_nf4_is_merged_into_what_the_trainer_had(base, adapter, nf4_model, tmp_path):
    none = shutil.copytree(adapter, tmp_path / "none")
    zeroed = {name: torch.zeros_like(value) for name, value in load_file(none / "adapter_model.safetensors").items()}
    save_file(zeroed, none / "adapter_model.safetensors")
    how = {"trained_on": "nf4", "trained_arithmetic": "cpu"}
    as_trained = _tensors(_written(base, none, tmp_path / "base", stored_as=torch.float32, **how))
    expected = _dequantized(nf4_model)
    assert set(expected) == {name for name in as_trained if _linear(name)}
    for name, value in expected.items():
        assert torch.equal(as_trained[name], value.float())
    original = _tensors(base)
    for name, value in as_trained.items():
        assert torch.equal(value, original[name].float()) == (name not in expected)

    merged = _tensors(_written(base, adapter, tmp_path / "merged", stored_as=torch.float32, **how))
    pairs = load_file(adapter / "adapter_model.safetensors")
    for name, value in expected.items():
        a, b = (pairs[f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight"].double() for half in "AB")
        exact = value.double() + 2.0 * (b @ a)
        assert (merged[name].double() - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_original_weights_are_used_where_asked_for(base, adapter, tmp_path):
    plain = _tensors(_written(base, adapter, tmp_path / "plain"))
    original = _tensors(_written(base, adapter, tmp_path / "original", trained_on="nf4", base_weights="original"))
    trained = _tensors(_written(base, adapter, tmp_path / "trained", trained_on="nf4"))
    assert all(torch.equal(plain[name], original[name]) for name in plain)
    assert all(torch.equal(plain[name], trained[name]) != _linear(name) for name in plain)


def test_a_base_that_is_nf4_itself_is_read_as_bitsandbytes_reads_it(nf4_base, nf4_model, adapter, tmp_path):
    out = _written(nf4_base, None, tmp_path / "out", stored_as=torch.bfloat16)
    written, expected = _tensors(out), _dequantized(nf4_model)
    for name, value in expected.items():
        assert torch.equal(written[name], value)
    assert set(written) == {name for name, _ in AutoModelForCausalLM.from_pretrained(out).named_parameters()}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert plan_merge(nf4_base, adapter, stored_as=torch.bfloat16, trained_on="nf4").updates


def test_a_base_that_is_nf4_itself_has_no_original_weights(nf4_base, adapter):
    with pytest.raises(InvalidArgumentError, match="exists as NF4 only") as caught:
        plan_merge(nf4_base, adapter, stored_as=torch.bfloat16, base_weights="original")
    assert caught.value.param == "base_weights"


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "nested_quant_map"])
@pytest.mark.parametrize("how", ["missing", "short"])
def test_an_nf4_base_that_lacks_part_of_a_state_is_an_error(nf4_base, tmp_path, part, how):
    broken = shutil.copytree(nf4_base, tmp_path / "broken")
    key = f"model.layers.1.mlp.down_proj.weight.{part}"
    file = broken / json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"][key]
    tensors = load_file(file)
    value = tensors.pop(key)
    save_file(tensors | ({key: value[1:].clone()} if how == "short" else {}), file)
    with pytest.raises(InvalidArgumentError, match=r"layers\.1\.mlp\.down_proj"):
        plan_merge(broken, None, stored_as=torch.bfloat16)


def test_a_base_quantized_in_another_way_is_refused(base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    config = json.loads((base / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnimplementedError, match="gptq"):
        plan_merge(broken, None, stored_as=torch.bfloat16)


def test_a_value_that_is_not_finite_is_named_in_an_nf4_trained_base(base, adapter, tmp_path):
    spoiled = shutil.copytree(base, tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    file = spoiled / index["model.layers.1.mlp.up_proj.weight"]
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file)
    for number, how in enumerate(({"trained_on": "nf4"}, {"form": "nf4"}, {"form": "fp8"})):
        with pytest.raises(InvalidArgumentError, match=r"layers\.1\.mlp\.up_proj.* of the base model contains NaN") as caught:
            _written(spoiled, adapter, tmp_path / str(number), **how)
        assert caught.value.code == "not_finite"


def test_merged_nf4_loads_in_transformers_as_the_nearest_codes_of_the_exact_merge(base, adapter, adapter_on_base, tmp_path):
    out = _written(base, adapter, tmp_path / "out", form="nf4")
    exact = _tensors(_written(base, adapter, tmp_path / "exact", stored_as=torch.float32))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.is_loaded_in_4bit
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    loaded = _dequantized(model)
    assert set(loaded) == {name for name in exact if _linear(name)}
    for name, value in loaded.items():
        blocks = exact[name].view(-1, 64)
        nearest = functional.quantize_4bit(exact[name], compress_statistics=False, quant_type="nf4")
        best = (functional.dequantize_4bit(*nearest).view(-1, 64) - blocks).norm()
        assert (value.float().view(-1, 64) - blocks).norm() <= 1.01 * best
    on_load = BitsAndBytesConfig(**NF4_CONFIG, bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", quantization_config=on_load, dtype=torch.bfloat16)
    expected, before = _logits(adapter_on_base(base, adapter)), _logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64))
    budget = 1.1 * (_logits(theirs) - expected).norm()
    assert (_logits(model) - expected).norm() < budget < 0.5 * (before - expected).norm()


def test_merged_nf4_has_the_tensors_that_transformers_saves(base, nf4_base, tmp_path):
    out = _tensors(_written(base, None, tmp_path / "out", form="nf4"))
    saved = _tensors(nf4_base)
    for name, value in saved.items():
        ours = out.pop(name)
        assert ours.dtype == value.dtype
        assert name.endswith(nf4.STATE_KEY) or ours.shape == value.shape
        if _linear(name) or name.endswith("quant_map"):
            assert torch.equal(ours, value)
    assert not out
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    theirs = json.loads((nf4_base / "config.json").read_text())["quantization_config"]
    assert config.pop("llm_int8_skip_modules") == ["lm_head"]
    assert {name: theirs[name] for name in config} == config


@pytest.mark.parametrize("form", ["fp8", "fp8_block"])
def test_fp8_values_are_the_nearest_to_the_exact_merge_by_the_formats_definition(base, adapter, tmp_path, form):
    out = _tensors(_written(base, adapter, tmp_path / "out", form=form))
    exact = _tensors(_written(base, adapter, tmp_path / "exact", stored_as=torch.float32))
    for name, value in exact.items():
        if not _linear(name):
            assert torch.equal(out[name], value.to(torch.bfloat16))
            continue
        rows, columns = value.shape
        scales = out.pop(name.replace(".weight", ".weight_scale")).float()
        assert scales.shape == ((rows, 1) if form == "fp8" else (-(-rows // 128), -(-columns // 128)))
        by_block = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        full = scales.expand(rows, columns) if form == "fp8" else by_block
        assert out[name].dtype == FP8
        values = out[name].float()
        assert torch.equal(values, (value / full).to(FP8).float())
        assert values.abs().max() <= 448
        # Three bits of mantissa, and what is below the smallest normal number.
        assert ((values * full - value).abs() <= torch.maximum(value.abs() / 16, full * 2**-10)).all()
    assert set(out) == set(exact)


def test_fp8_scales_are_never_too_small_and_exact_in_bfloat16():
    peaks = torch.cat((torch.rand(10_000) * 3, torch.tensor([0.0, 1e-38, 448.0, 3e38])))
    scales = fp8_scales(peaks)
    assert torch.equal(scales.to(torch.bfloat16).float(), scales)
    assert (scales.double() * 448 >= peaks.double() * (1 - 1e-7)).all()
    normal = peaks > 1e-30
    assert (scales[normal].double() * 448 <= peaks[normal].double() * (1 + 2**-7)).all()


def test_fp8_in_blocks_of_widths_that_have_no_whole_ones_is_an_error(make_base):
    with pytest.raises(InvalidArgumentError, match=r"fp8_block wants sizes that are multiples of 128, and .*_proj\.weight is"):
        plan_merge(make_base(), None, stored_as=torch.bfloat16, form="fp8_block")


def test_models_whose_weights_are_not_in_linear_layers_are_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UnimplementedError, match="nf4, which is for linear layers, and only"):
        plan_merge(tmp_path / "base", None, stored_as=torch.bfloat16, form="nf4")


def _by_vllm_python(program: str, out: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """What `program` saves: its arguments are the folder of a model and the file to write, which may hold what to read first."""
    python = os.environ.get("FINERY_VLLM_PYTHON") or CHECKOUT / ".venv-vllm" / "bin" / "python"
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_WAIT_POLICY": "PASSIVE", "VLLM_NO_USAGE_STATS": "1"}
    result = tmp_path / "result.safetensors"
    command = [python, "-c", program, out, result]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=250, env=os.environ | quiet)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(result)


def _fp8(values: torch.Tensor) -> torch.Tensor:
    """Rows of `values` as FP8 with a scale for each row, in fp64 again."""
    scales = values.abs().amax(-1, keepdim=True) / 448
    return (values / scales).float().to(FP8).double() * scales


def _in_fp8(model: torch.nn.Module, form: str) -> torch.nn.Module:
    """The exact model with inputs and weights of its linear layers rounded as the format says, in fp64: what FP8 costs."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
            blocks = module.weight.data
            if form == "fp8_block":
                rows, columns = blocks.shape
                blocks = blocks.view(rows // 128, 128, columns // 128, 128).transpose(1, 2).reshape(-1, 128 * 128)
                blocks = _fp8(blocks).view(rows // 128, columns // 128, 128, 128).transpose(1, 2).reshape(rows, columns)
            module.weight.data = blocks if form == "fp8_block" else _fp8(blocks)
            split = (-1, 128) if form == "fp8_block" else (-1,)
            module.register_forward_pre_hook(lambda _, args, split=split: (_fp8(args[0].unflatten(-1, split)).reshape(args[0].shape),))
    return model


@pytest.fixture(scope="module")
def fp8_folders(base, adapter, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fp8")
    return {form: _written(base, adapter, folder / form, form=form) for form in ("fp8", "fp8_block")}


@pytest.mark.slow
def test_fp8_loads_in_transformers_with_compressed_tensors(fp8_folders, base, adapter, adapter_on_base, tmp_path):
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from safetensors.torch import save_file\n"
        "found = {}\n"
        "for form in ('fp8', 'fp8_block'):\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/' + form)\n"
        "    layer = model.model.layers[0].mlp.up_proj\n"
        "    found |= {form + '.weight': layer.weight.data.float(), form + '.scale': layer.weight_scale.data.float()}\n"
        "    with torch.no_grad(): found[form] = model(torch.arange(3, 35).reshape(2, 16)).logits.float()\n"
        "save_file(found, sys.argv[2])"
    )
    found = _by_vllm_python(program, fp8_folders["fp8"].parent, tmp_path)
    expected, before = _logits(adapter_on_base(base, adapter)), _logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64))
    for form, folder in fp8_folders.items():
        written = _tensors(folder)
        assert torch.equal(found[f"{form}.weight"], written["model.layers.0.mlp.up_proj.weight"].float())
        assert torch.equal(found[f"{form}.scale"], written["model.layers.0.mlp.up_proj.weight_scale"].float())
        budget = 1.2 * (_logits(_in_fp8(adapter_on_base(base, adapter).merge_and_unload(), form)) - expected).norm()
        assert (found[form].double() - expected).norm() < budget < 0.5 * (before - expected).norm()


def _logprobs_of_vllm(folder: Path, tmp_path: Path) -> torch.Tensor:
    """What vLLM gives the token after each row of `PROMPTS`."""
    program = (
        "import sys, torch; from vllm import LLM, SamplingParams; from safetensors.torch import load_file, save_file\n"
        "if __name__ == '__main__':\n"
        "    model = LLM(sys.argv[1], max_model_len=64, enforce_eager=True, skip_tokenizer_init=True, max_logprobs=320)\n"
        "    asked = [{'prompt_token_ids': row} for row in load_file(sys.argv[2])['prompts'].tolist()]\n"
        "    answers = model.generate(asked, SamplingParams(max_tokens=1, temperature=0, logprobs=320, detokenize=False))\n"
        "    found = [[answer.outputs[0].logprobs[0][token].logprob for token in range(320)] for answer in answers]\n"
        "    save_file({'logprobs': torch.tensor(found)}, sys.argv[2])"
    )
    save_file({"prompts": PROMPTS}, tmp_path / "result.safetensors")
    return _by_vllm_python(program, folder, tmp_path)["logprobs"].double()


def _logprobs(model: torch.nn.Module) -> torch.Tensor:
    return _logits(model, PROMPTS)[:, -1].log_softmax(-1)


def _check_fp8_in_vllm(form: str, folder: Path, base: Path, adapter: Path, adapter_on_base, tmp_path: Path) -> None:
    found = _logprobs_of_vllm(folder, tmp_path)
    expected = _logprobs(adapter_on_base(base, adapter))
    in_fp8 = _logprobs(_in_fp8(adapter_on_base(base, adapter).merge_and_unload(), form))
    before = _logprobs(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64))
    budget = 1.2 * (in_fp8 - expected).norm()
    assert (found - expected).norm() < budget < 0.5 * (before - expected).norm()


@pytest.mark.slow
def test_fp8_by_channel_runs_in_vllm(fp8_folders, base, adapter, adapter_on_base, tmp_path):
    """On CPUs vLLM has no kernels for FP8 in blocks, nor for bitsandbytes: transformers opens those, and vLLM on a GPU."""
    _check_fp8_in_vllm("fp8", fp8_folders["fp8"], base, adapter, adapter_on_base, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fp8", "fp8_block"])
def test_fp8_runs_in_vllm_on_a_gpu(fp8_folders, base, adapter, adapter_on_base, tmp_path, form):
    _check_fp8_in_vllm(form, fp8_folders[form], base, adapter, adapter_on_base, tmp_path)


@pytest.mark.gpu
def test_merged_nf4_runs_in_vllm_on_a_gpu(base, adapter, adapter_on_base, tmp_path):
    out = _written(base, adapter, tmp_path / "out", form="nf4")
    found = _logprobs_of_vllm(out, tmp_path)
    expected = _logprobs(adapter_on_base(base, adapter))
    in_nf4 = _logprobs(AutoModelForCausalLM.from_pretrained(out))
    before = _logprobs(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64))
    budget = 1.2 * (in_nf4 - expected).norm()
    assert (found - expected).norm() < budget < 0.5 * (before - expected).norm()
