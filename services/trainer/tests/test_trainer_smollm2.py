"""SmolLM2 itself: the folder made of its GGUF, and a few rows learnt by LoRA."""

from __future__ import annotations

import json

import pytest
import torch

from finery_common.catalogue import check_folder
from finery_common.errors import AlreadyExistsError, InvalidArgumentError
from finery_common.spec import TrainingSpec
from finery_trainer import engine
from finery_trainer.base_models import import_gguf, main
from finery_trainer.engine.data import TokenDataset
from finery_trainer.engine.loop import Action

QUESTIONS = ("Who runs the forge?", "What is a finery?", "Where does pig iron go?", "What comes out?")


@pytest.mark.slow
def test_lora_learns_a_handful_of_rows(base_model_dir, tmp_path, write_rows):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model_dir)
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "The hammer man of Finery."}] for text in QUESTIONS]
    rows = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
    spec = TrainingSpec.parse(
        {
            "base_model": "SmolLM2-135M-Instruct",
            "optimizer": {"learning_rate": 2e-3, "min_warmup_steps": 0, "warmup_ratio": 0},
            "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 1},
            "num_epochs": 4,
        }
    )
    model = engine.load(spec, base_model_dir, device=torch.device("cpu"))
    losses: list[float] = []
    engine.loop.train(model, TokenDataset(write_rows(tmp_path, rows)), spec, lambda r: (losses.append(r.loss), Action.CONTINUE)[1])
    assert losses[-1] < losses[0] / 2


def test_the_folder_made_of_the_gguf_is_a_whole_model(base_model_dir):
    from transformers import AutoTokenizer

    check_folder(base_model_dir, name="SmolLM2")
    config = json.loads((base_model_dir / "config.json").read_text())
    generation = json.loads((base_model_dir / "generation_config.json").read_text())
    assert (config["model_type"], config["dtype"], config.get("quantization_config")) == ("llama", "float32", None)
    assert generation["eos_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(base_model_dir)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_file_that_is_no_gguf_leaves_nothing(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"nonsense")
    with pytest.raises(InvalidArgumentError, match="wanted a GGUF file"):
        import_gguf(tmp_path / "model.gguf", out_dir=tmp_path / "out")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    assert main(["import-gguf", str(tmp_path / "cut.gguf"), str(tmp_path / "out")]) == 1
    assert "cannot be read as a causal language model" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "model.gguf"]


def test_an_existing_folder_is_never_written_over(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "out").mkdir()
    with pytest.raises(AlreadyExistsError):
        import_gguf(tmp_path / "model.gguf", out_dir=tmp_path / "out")
