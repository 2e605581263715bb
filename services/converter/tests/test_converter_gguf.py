"""GGUF files of a merged SmolLM2, answered from by a real llama.cpp runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finery_common.conversion_spec import OutputType
from finery_common.errors import FailedPreconditionError, UnimplementedError
from finery_converter import gguf, worker

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


def _transformers_answer(model_dir: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def _convert(base: Path, adapter: Path, folder: Path, converter_dir: Path, *, format_: str) -> list[tuple[str, float]]:
    """Converts to f16; the result is in `folder`/output."""
    (folder / "output").mkdir(parents=True)
    reports: list[tuple[str, float]] = []
    task = worker.Task(str(base), str(adapter), str(folder / "output"), str(folder), format_, "f16", "test-model", str(converter_dir))
    worker.convert(task, lambda step, share: reports.append((step, share)))
    return reports


@pytest.fixture(scope="module")
def adapter(base_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    tokenizer = AutoTokenizer.from_pretrained(base_model_dir)
    torch.manual_seed(5)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model_dir, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW((item for item in model.parameters() if item.requires_grad), lr=3e-3)
    rows = tokenizer(PROMPT + ANSWER + tokenizer.eos_token, return_tensors="pt")
    for _ in range(12):
        loss = model(**rows, labels=rows["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def converted(base_model_dir, adapter, converter_dir, tmp_path_factory) -> tuple[Path, list[tuple[str, float]]]:
    """The folder of a finished conversion to an f16 GGUF, and what was reported."""
    folder = tmp_path_factory.mktemp("gguf")
    return folder, _convert(base_model_dir, adapter, folder, converter_dir, format_="gguf")


@pytest.mark.slow
def test_llama_cpp_continues_an_f16_gguf_as_transformers_continues_the_merged_model(
    base_model_dir, adapter, converter_dir, converted, tmp_path
):
    folder, reports = converted
    assert [path.name for path in (folder / "output").iterdir()] == ["model.f16.gguf"]
    assert [step for step, _ in reports][:2] == ["checking", "merging"]
    shares = [share for _, share in reports]
    assert shares == sorted(shares)
    assert reports[-1] == ("writing GGUF", 1.0)

    assert ANSWER not in _transformers_answer(base_model_dir)
    _convert(base_model_dir, adapter, tmp_path, converter_dir, format_="safetensors")
    said = _transformers_answer(tmp_path / "output")
    assert said.startswith(ANSWER)
    assert _llama_answer(folder / "output" / "model.f16.gguf") == said.removesuffix("<|im_end|>")


@pytest.mark.slow
@pytest.mark.parametrize(("type_", "most_bytes"), [(OutputType.Q8_0, 150e6), (OutputType.BF16, 275e6)])
def test_llama_cpp_knows_the_trained_fact_from_q8_0_and_bf16(converter_dir, converted, tmp_path, type_, most_bytes):
    merged_dir, file = converted[0] / "merged", tmp_path / "model.gguf"
    gguf.convert(merged_dir, file, type_=type_, model_name="test", converter_dir=converter_dir, on_progress=lambda share: None)
    assert file.stat().st_size < most_bytes
    assert _llama_answer(file).startswith(ANSWER)


@pytest.mark.slow
def test_an_architecture_that_gguf_lacks_is_named_before_anything_is_merged_with_those_it_knows(
    base_model_dir, adapter, converter_dir, tmp_path
):
    base = tmp_path / "base"
    base.mkdir()
    for file in base_model_dir.iterdir():
        (base / file.name).symlink_to(file)
    (base / "config.json").unlink()
    config = json.loads((base_model_dir / "config.json").read_text()) | {"architectures": ["FerryForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnimplementedError, match=r"no form of the architecture FerryForCausalLM\. Known are: .*LlamaForCausalLM"):
        _convert(base, adapter, tmp_path / "gguf", converter_dir, format_="gguf")
    assert not (tmp_path / "gguf" / "merged").exists()


def test_a_tokenizer_that_gguf_does_not_know_is_said(base_model_dir, converter_dir, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in base_model_dir.iterdir():
        (base / file.name).symlink_to(file)
    (base / "tokenizer.json").unlink()
    tokenizer = json.loads((base_model_dir / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnimplementedError, match="tokenizer") as caught:
        gguf.check_supported(base, converter_dir=converter_dir, scratch_dir=tmp_path)
    assert caught.value.code == "gguf_unsupported_tokenizer"


def test_a_missing_converter_is_said_with_what_to_do(base_model_dir, tmp_path):
    with pytest.raises(FailedPreconditionError, match="FINERY_CONVERT_HF_TO_GGUF: .* `make setup`"):
        gguf.check_supported(base_model_dir, converter_dir=tmp_path, scratch_dir=tmp_path)
