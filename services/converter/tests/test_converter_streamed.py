"""The streamed pass against transformers and PEFT, over families, adapters and ways of storing, and its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV3Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from finery_common.errors import FailedPreconditionError, InvalidArgumentError, UnimplementedError
from finery_converter.plain_forms import RoundedWeights
from finery_converter.streamed import StreamedModel
from finery_converter.weights import FolderWeights

SEQUENCES = [list(range(3, 20)), list(range(40, 52)), list(range(100, 130))]
_SMALL = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DENSE = {
    "llama": LlamaConfig(**_SMALL),
    "llama-tied": LlamaConfig(**_SMALL, tie_word_embeddings=True, attention_bias=True),
    "qwen2": Qwen2Config(**_SMALL),
    "qwen3": Qwen3Config(**_SMALL, head_dim=16),
    "gemma2": Gemma2Config(**_SMALL, head_dim=16, sliding_window=8),
    "gemma3": Gemma3TextConfig(**_SMALL, head_dim=16, sliding_window=8),
    "phi3": Phi3Config(**_SMALL),
    "granite": GraniteConfig(**_SMALL, logits_scaling=3.0),
    "cohere2": Cohere2Config(**_SMALL),
    "olmo2": Olmo2Config(**_SMALL),
}
OTHERS = {
    "mixtral": MixtralConfig(**_SMALL, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**_SMALL, head_dim=16, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(**_SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(
        **{**_SMALL, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt2": GPT2Config(vocab_size=320, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "falcon_h1": FalconH1Config(
        **_SMALL, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, time_step_limit=(0.0, 10.0)
    ),
}


def _save(config, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.03)
    model.to(dtype).save_pretrained(folder)
    return folder


def _logits(model, sequences=SEQUENCES) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.eval()(torch.tensor([ids])).logits[0] for ids in sequences]


def _streamed(model: StreamedModel, sequences=SEQUENCES) -> list[torch.Tensor]:
    return [model.logits(state) for state in model.states(sequences)]


def _assert_same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("family", [*DENSE, *OTHERS])
def test_a_streamed_pass_says_what_transformers_says(family, tmp_path):
    folder = _save((DENSE | OTHERS)[family], tmp_path)
    _assert_same(_streamed(StreamedModel(folder)), _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))


def _adapter(folder: Path, out: Path, *, std: float = 0.05, **lora) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), LoraConfig(**settings))
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or (parameter.requires_grad and name.endswith("bias")):
            torch.nn.init.normal_(parameter, std=std)
        elif "magnitude" in name:
            parameter.data.mul_(1.5)
    model.save_pretrained(out, save_embedding_layers=False)
    return model


@pytest.mark.parametrize("family", DENSE)
def test_an_adapter_is_applied_as_peft_applies_it(family, tmp_path):
    folder = _save(DENSE[family], tmp_path / "base")
    wanted = _logits(_adapter(folder, tmp_path / "adapter"))
    _assert_same(_streamed(StreamedModel(folder, adapter_dir=tmp_path / "adapter")), wanted)
    assert (wanted[0] - _logits(AutoModelForCausalLM.from_pretrained(folder))[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {"use_rslora": True}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 32, "v_proj": 3}}),
        ("llama", {"use_dora": True}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama-tied", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
        ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
)
def test_each_kind_of_adapter_is_applied_as_peft_applies_it(family, lora, tmp_path):
    folder = _save((DENSE | OTHERS)[family], tmp_path / "base")
    model = _adapter(folder, tmp_path / "adapter", **lora)
    if "modules_to_save" in lora:
        model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").data.mul_(1.25)
        model.save_pretrained(tmp_path / "adapter")
    _assert_same(_streamed(StreamedModel(folder, adapter_dir=tmp_path / "adapter")), _logits(model))


def test_an_adapter_of_single_experts_is_added_to_the_fused_ones(tmp_path):
    folder = _save(OTHERS["mixtral"], tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1"
    a, b = torch.randn(4, 48), torch.randn(96, 4) * 0.1
    _write_adapter(tmp_path / "adapter", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors[f"{name}.weight"] += 2 * b @ a
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    _assert_same(_streamed(StreamedModel(folder, adapter_dir=tmp_path / "adapter")), _streamed(StreamedModel(merged)))


def _write_adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def test_an_adapter_without_a_place_in_the_model_is_an_error(tmp_path):
    folder = _save(DENSE["llama"], tmp_path / "base")
    names = "model.layers.7.self_attn.q_proj"
    _write_adapter(tmp_path / "adapter", {f"{names}.lora_A.weight": torch.randn(4, 48), f"{names}.lora_B.weight": torch.randn(48, 4)})
    with pytest.raises(InvalidArgumentError, match=r"match nothing in the base model, such as model\.layers\.7"):
        StreamedModel(folder, adapter_dir=tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_computed_with_in_float32(dtype, tmp_path):
    folder = _save(DENSE["qwen3"], tmp_path, dtype=dtype)
    _assert_same(_streamed(StreamedModel(folder)), _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))


def test_sharded_weights_are_read_from_all_their_files(tmp_path):
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(DENSE["llama"])
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _assert_same(_streamed(StreamedModel(tmp_path)), _logits(model))


def test_tensors_are_read_in_blocks(monkeypatch, tmp_path):
    folder = _save(DENSE["llama"], tmp_path / "base", dtype=torch.bfloat16)
    _adapter(folder, tmp_path / "adapter", use_dora=True)
    whole = _streamed(StreamedModel(folder, adapter_dir=tmp_path / "adapter"))
    monkeypatch.setattr("finery_converter.weights.BLOCK_BYTES", 1)
    assert [len(block) for block in FolderWeights(folder).blocks("lm_head.weight")] == [128, 128, 64]
    _assert_same(_streamed(StreamedModel(folder, adapter_dir=tmp_path / "adapter")), whole)


def test_walks_of_few_tokens_say_what_one_walk_says(tmp_path):
    folder = _save(DENSE["gemma3"], tmp_path)
    _assert_same(_streamed(StreamedModel(folder, max_tokens=1)), _streamed(StreamedModel(folder)))


def test_weights_can_be_rounded_or_quantized_on_their_way(tmp_path):
    folder = _save(DENSE["llama-tied"], tmp_path)
    weights = FolderWeights(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(torch.float16).to(torch.float32)
    _assert_same(_streamed(StreamedModel(folder, weights=RoundedWeights(weights, dtype=torch.float16))), _logits(model))

    name = "model.layers.1.mlp.up_proj.weight"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_parameter(name).data.round_(decimals=2)
    quantized = RoundedWeights(weights, dtype=torch.float32, quantized={name}, form=lambda weight: weight.round(decimals=2))
    _assert_same(_streamed(StreamedModel(folder, weights=quantized)), _logits(model))


def test_an_observer_hears_the_inputs_of_linear_layers_without_padding(tmp_path):
    folder = _save(DENSE["llama"], tmp_path)
    heard: dict[str, torch.Tensor] = {}
    StreamedModel(folder, observer=lambda name, x: heard.setdefault(name, x.clone())).states(SEQUENCES)
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: wanted.append(args[0][0]))
    _logits(model)

    assert sorted(heard) == sorted(
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    got = heard["model.layers.1.mlp.down_proj"]
    assert got.shape == (sum(map(len, SEQUENCES)), 96)
    by_length = [len(ids) for ids in sorted(SEQUENCES, key=len, reverse=True)]
    wanted = sorted(wanted, key=len, reverse=True)
    for one, other in zip(got.split(by_length), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_missing_weights_other_shapes_and_ids_beyond_the_vocabulary_are_refused(tmp_path):
    folder = _save(DENSE["llama"], tmp_path)
    model = StreamedModel(folder)
    for ids in ([], [320], [-1]):
        with pytest.raises(InvalidArgumentError, match="below 320"):
            model.states([[1, 2], ids])
    tensors = load_file(folder / "model.safetensors")
    other = tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(95, 48)}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidArgumentError, match=r"up_proj\.weight of shape \[95, 48\], wanted \[96, 48\]"):
        StreamedModel(folder)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FailedPreconditionError, match=r"lacks 1 of the weights .*up_proj"):
        StreamedModel(folder)
    (folder / "config.json").write_text('{"model_type": "of_nobody"}')
    with pytest.raises(UnimplementedError, match="no causal language model"):
        StreamedModel(folder)


def test_an_architecture_that_uses_a_layers_weights_by_itself_is_refused_and_not_wrong(tmp_path):
    folder = _save(MambaConfig(vocab_size=320, hidden_size=48, num_hidden_layers=2, state_size=8), tmp_path)
    with pytest.raises(UnimplementedError, match="MambaForCausalLM uses weights in a way"):
        StreamedModel(folder).states(SEQUENCES)


_MEASURE = """
import sys, torch
from pathlib import Path
from finery_converter.plain_forms import RoundedWeights
from finery_converter.streamed import StreamedModel
from transformers import LlamaForCausalLM
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
StreamedModel(Path(sys.argv[1])).states([[1, 2]])
before = peak()
model = StreamedModel(Path(sys.argv[2]))
states = model.states([list(range(64))] * 8)
model.logits(states[0])
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """About 1.1 GB of float32, whose largest tensor, the embedding, is 134 MB."""
    shape = {
        **_SMALL,
        "vocab_size": 32_768,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    tiny = _save(DENSE["llama"], tmp_path / "tiny")
    extra_kib: dict[int, int] = {}
    for layers in (2, 12):
        folder = tmp_path / str(layers)
        AutoModelForCausalLM.from_config(LlamaConfig(**{**shape, "num_hidden_layers": layers})).save_pretrained(folder)
        command = [sys.executable, "-c", _MEASURE, str(tiny), str(folder)]
        extra_kib[layers] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / "12" / "model.safetensors").stat().st_size > 1e9
    assert extra_kib[12] < 256 * 1024
    assert extra_kib[12] < extra_kib[2] + 32 * 1024
