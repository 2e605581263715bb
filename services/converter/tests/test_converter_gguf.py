"""A trained SmolLM2 in each format, answered from by the engine that it is for: llama.cpp's runtime, transformers."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finery_common.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError, UnimplementedError
from finery_converter import gguf
from finery_converter.gguf_parity import GgufModel, compare_with_logits, greedy
from finery_converter.merge import merge, plan_merge
from finery_converter.quantize import quantize

ROOT = Path(__file__).resolve().parents[3]
# A fact that the base model does not know and the adapter is trained on.
PROMPT = "The old smith of Ferrow is called"
ANSWER = " Tobias Quillhammer."
NUM_TOKENS = 12
# In a process of its own: llama.cpp writes to standard error, and its threads spin.
LLAMA_CPP = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
answer = server.handle_completions({"prompt": sys.argv[2], "max_tokens": int(sys.argv[3]), "temperature": 0})
print(json.dumps(answer["choices"][0]["text"]))
"""


def _llama_answer(file: Path) -> str:
    command = [sys.executable, "-c", LLAMA_CPP, str(file), PROMPT, str(NUM_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


ANSWER_BY_TRANSFORMERS = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs = tokenizer({PROMPT!r}, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens={NUM_TOKENS}, do_sample=False)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:]))
"""


def _transformers_answer(model_dir: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def _nothing(_share: float) -> None:
    return


@pytest.fixture(scope="module")
def adapter(base_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    tokenizer = AutoTokenizer.from_pretrained(base_model_dir)
    torch.manual_seed(5)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model_dir, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW((item for item in model.parameters() if item.requires_grad), lr=3e-3)
    rows = tokenizer(PROMPT + ANSWER + tokenizer.eos_token, return_tensors="pt")
    for _ in range(24):
        loss = model(**rows, labels=rows["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def merged_dir(base_model_dir, adapter, tmp_path_factory) -> Path:
    """Merged by PEFT itself, in float32."""
    folder = tmp_path_factory.mktemp("merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model_dir, dtype=torch.float32), adapter)
    model.merge_and_unload().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base_model_dir / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def f16(merged_dir, converter_dir, tmp_path_factory) -> tuple[Path, list[float]]:
    file, shares = tmp_path_factory.mktemp("gguf") / "model.f16.gguf", []
    assert gguf.convert(merged_dir, file, type_="f16", model_name="test-model", converter_dir=converter_dir, on_progress=shares.append) == (
        file,
    )
    return file, shares


def _logits_on_base(base: Path, adapter: Path, ids: list[int], out: Path) -> Path:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        np.save(out, model(input_ids=torch.tensor([ids])).logits[0].numpy())
    return out


@pytest.mark.slow
def test_llama_cpp_continues_an_f16_gguf_as_transformers_continues_the_merged_model(base_model_dir, merged_dir, f16):
    file, shares = f16
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert ANSWER not in _transformers_answer(base_model_dir)
    said = _transformers_answer(merged_dir)
    assert said.startswith(ANSWER)
    assert _llama_answer(file) == said.removesuffix("<|im_end|>")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "python"),
    [
        (None, sys.executable),
        ("nf4", sys.executable),
        ("fp8", os.environ.get("FINERY_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python"),
    ],
)
def test_transformers_knows_the_trained_fact_from_merged_folders(base_model_dir, adapter, tmp_path, form, python):
    """FP8 in the environment of vLLM, which has compressed-tensors."""
    merge(plan_merge(base_model_dir, adapter, stored_as=torch.bfloat16, form=form), tmp_path, on_progress=_nothing)
    command = [python, "-c", ANSWER_BY_TRANSFORMERS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(ANSWER)


@pytest.mark.slow
@pytest.mark.parametrize(("type_", "most_bytes"), [("q8_0", 150e6), ("bf16", 275e6)])
def test_llama_cpp_knows_the_trained_fact_from_q8_0_and_bf16(merged_dir, converter_dir, tmp_path, type_, most_bytes):
    file = tmp_path / "model.gguf"
    gguf.convert(merged_dir, file, type_=type_, model_name="test", converter_dir=converter_dir, on_progress=_nothing)
    assert file.stat().st_size < most_bytes
    assert _llama_answer(file).startswith(ANSWER)


@pytest.mark.slow
@pytest.mark.parametrize("type_", ["q6_k", "q5_k_m", "q4_k_m", "q4_0"])
def test_another_build_of_llama_cpp_knows_the_trained_fact_from_quantized_files(f16, tmp_path, type_):
    small = quantize(f16[0], tmp_path / "model.gguf", type_=type_, on_progress=_nothing)
    assert _llama_answer(small.files[0]).startswith(ANSWER)


@pytest.mark.slow
def test_an_adapter_on_a_gguf_base_says_what_peft_says_and_without_it_the_fact_is_unknown(base_model_dir, adapter, converter_dir, tmp_path):
    base, lora = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    gguf.convert(base_model_dir, base, type_="f32", model_name="test", converter_dir=converter_dir, on_progress=_nothing)
    gguf.convert_lora(adapter, base_model_dir, lora, converter_dir=converter_dir, on_progress=_nothing)
    tokenizer = AutoTokenizer.from_pretrained(base_model_dir)
    ids = tokenizer(PROMPT + ANSWER)["input_ids"]
    logits = _logits_on_base(base_model_dir, adapter, ids, tmp_path / "logits.npy")
    both = GgufModel(file=base, lora=lora)
    comparison = compare_with_logits(logits, both, [ids], on_progress=_nothing, num_threads=1)
    assert comparison.max_kl < 1e-6
    assert comparison.candidate_perplexity == pytest.approx(comparison.reference_perplexity, rel=1e-4)
    without = compare_with_logits(logits, GgufModel(file=base), [ids], on_progress=_nothing, num_threads=1)
    assert without.max_kl > 1
    prompt = tokenizer(PROMPT)["input_ids"]
    assert tokenizer.decode(greedy(both, [prompt], num_tokens=NUM_TOKENS, on_progress=_nothing)[0]).startswith(ANSWER)
    halved = compare_with_logits(logits, GgufModel(file=base, lora=lora, lora_scale=0.5), [ids], on_progress=_nothing, num_threads=1)
    assert comparison.max_kl < halved.max_kl


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
    ],
)
def test_scales_that_gguf_has_no_place_for_are_kept(make_speaker, make_adapter, converter_dir, tmp_path, lora):
    folder = make_speaker()
    adapter = make_adapter(folder, **lora)
    base, file, ids = tmp_path / "base.gguf", tmp_path / "adapter.gguf", [7, 4000, 31000, 12, 9, 81]
    gguf.convert(folder, base, type_="f32", model_name="test", converter_dir=converter_dir, on_progress=_nothing)
    gguf.convert_lora(adapter, folder, file, converter_dir=converter_dir, on_progress=_nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.gguf", "base.gguf"]
    logits = _logits_on_base(folder, adapter, ids, tmp_path / "logits.npy")
    right = compare_with_logits(logits, GgufModel(file=base, lora=file), [ids], on_progress=_nothing, num_threads=1)
    plain = compare_with_logits(logits, GgufModel(file=base, lora=file, lora_scale=0.9), [ids], on_progress=_nothing, num_threads=1)
    assert right.max_kl < 1e-5
    assert plain.max_kl > 100 * right.max_kl
    assert math.isfinite(plain.max_kl)


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("peft_type", "IA3")])
def test_an_adapter_that_gguf_can_not_hold_is_refused_with_what_it_has(base_model_dir, converter_dir, tmp_path, key, value):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, key: value}))
    with pytest.raises(InvalidArgumentError, match=f"plain LoRA matrices only, and this one has {key}: ") as caught:
        gguf.convert_lora(tmp_path, base_model_dir, tmp_path / "adapter.gguf", converter_dir=converter_dir, on_progress=_nothing)
    assert caught.value.code == "gguf_adapter_unsupported"


def _with(base_model_dir: Path, folder: Path, name: str, content: object) -> Path:
    """The base model with one file changed."""
    folder.mkdir()
    for file in base_model_dir.iterdir():
        if file.name != name:
            (folder / file.name).symlink_to(file)
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.slow
def test_an_architecture_that_gguf_lacks_is_named_with_those_it_knows(base_model_dir, converter_dir, tmp_path):
    config = json.loads((base_model_dir / "config.json").read_text()) | {"architectures": ["FerryForCausalLM"]}
    base = _with(base_model_dir, tmp_path / "base", "config.json", config)
    with pytest.raises(UnimplementedError, match=r"no form of the architecture FerryForCausalLM\. Known are: .*LlamaForCausalLM"):
        gguf.check_supported(base, converter_dir=converter_dir, scratch_dir=tmp_path)


def test_a_tokenizer_that_gguf_does_not_know_is_said(base_model_dir, converter_dir, tmp_path):
    tokenizer = json.loads((base_model_dir / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
    base = _with(base_model_dir, tmp_path / "base", "tokenizer.json", tokenizer)
    with pytest.raises(UnimplementedError, match="tokenizer") as caught:
        gguf.check_supported(base, converter_dir=converter_dir, scratch_dir=tmp_path)
    assert caught.value.code == "gguf_unsupported_tokenizer"


def test_a_missing_converter_is_said_with_what_to_do(base_model_dir, tmp_path):
    with pytest.raises(FailedPreconditionError, match="FINERY_CONVERT_HF_TO_GGUF: .* `make setup`"):
        gguf.check_supported(base_model_dir, converter_dir=tmp_path, scratch_dir=tmp_path)


def test_a_full_disk_is_said(make_speaker, converter_dir, tmp_path):
    (tmp_path / "model.gguf").symlink_to("/dev/full")
    with pytest.raises(ResourceExhaustedError, match="The disk filled up"):
        gguf.convert(
            make_speaker(), tmp_path / "model.gguf", type_="f16", model_name="test", converter_dir=converter_dir, on_progress=_nothing
        )


def test_parts_smaller_than_a_tensor_are_refused(make_speaker, converter_dir, tmp_path):
    with pytest.raises(InvalidArgumentError, match="a single tensor of this model takes"):
        gguf.convert(
            make_speaker(),
            tmp_path / "model.gguf",
            type_="f16",
            model_name="test",
            converter_dir=converter_dir,
            max_part_bytes=9_000_000,
            on_progress=_nothing,
        )
