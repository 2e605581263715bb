"""What a spec makes of a base model's folder: precision, quantization while loading, adapters, full training."""

import hashlib
import json
import shutil
import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_common.spec import Quantization, TrainingSpec
from finery_trainer import engine
from finery_trainer.engine import model as models
from finery_trainer.engine.packing import pack
from finery_trainer.engine.stack import TrainingStack, unsupported

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _configs():
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Phi3Config

    few = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return {
        "llama": LlamaConfig(**SIZES, attention_bias=True),
        "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
        "phi3": Phi3Config(**SIZES),
        "gpt_neox": GPTNeoXConfig(**few),
        "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of several shards each, by family."""
    from transformers import AutoModelForCausalLM

    folders = {}
    for name, config in _configs().items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("bases") / name
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folders[name], max_shard_size="100KB")
    assert len(list(folders["llama"].glob("*.safetensors"))) > 2
    return folders


def spec_of(**fields) -> TrainingSpec:
    return TrainingSpec.parse({"base_model": "tiny", "max_sequence_length": 64, **fields})


def load(spec, folder, *, device=CPU) -> Any:
    return engine.load(spec, folder, device=device)


def load_base(folder, **options) -> Any:
    return models.load_base(folder, **options)


def _tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _logits(model, *, length=12):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 3 + length)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_the_wanted_precision_and_the_files_values(folders, dtype):
    model = load_base(folders["llama"], dtype=dtype, device=CPU)
    for name, tensor in _tensors(folders["llama"]).items():
        assert torch.equal(model.get_parameter(name), tensor.to(dtype)), name


@pytest.mark.parametrize("family", ["llama", "llama-tied", "phi3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_weights_are_bitsandbytes_own_of_the_files_and_everything_else_is_not_quantized(folders, family, dtype):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    model = load_base(folders[family], dtype=dtype, quantization=Quantization.NF4, device=CPU)
    files = dict(load_base(folders[family], dtype=torch.float32, device=CPU).named_parameters())
    quantized: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    decoder = {name for name in files if ".layers." in name or ".h." in name}
    assert {f"{name}.weight" for name in quantized} == {name for name in decoder if files[name].dim() == 2}
    for name, module in quantized.items():
        weight = files[f"{name}.weight"].to(dtype)
        weight = weight.T.contiguous() if family == "gpt2" else weight
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(module.weight.data, packed), name
        assert torch.equal(dequantize_4bit(packed, module.weight.quant_state), dequantize_4bit(packed, state)), name
    rest = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in quantized}
    assert rest
    assert all(p.dtype == dtype and torch.equal(p, files[name].to(dtype)) for name, p in rest.items())


def test_tied_weights_stay_one_matrix(folders):
    for quantization in Quantization:
        model = load_base(folders["llama-tied"], dtype=torch.float32, quantization=quantization, device=CPU)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_adapters_on_nf4_are_float32_and_the_engine_trains_them(folders):
    model = load(spec_of(quantization="nf4", precision="bfloat16", lora={"rank": 4}), folders["llama"], device=CPU)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * len(LINEARS)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert unsupported(model) is None
    stack = TrainingStack(model)
    ids = torch.arange(3, 15).numpy()
    assert stack.forward_backward(pack([(ids, ids)]), num_labels=12).isfinite()
    assert all(stack.gradient_of(p).norm() > 0 for name, p in trained.items() if "lora_B" in name)


def test_evaluation_on_a_cpu_leaves_nf4_weights_as_they_are(folders):
    model = load_base(folders["llama"], dtype=torch.bfloat16, quantization=Quantization.NF4, device=CPU).eval()
    before = [module.weight.data.clone() for module in model.modules() if hasattr(module, "quant_state")]
    _logits(model)
    after = [module.weight.data for module in model.modules() if hasattr(module, "quant_state")]
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_int8_weights_lie_within_half_a_step_of_the_files(folders):
    model = load(spec_of(quantization="int8", lora={"rank": 4}), folders["llama"], device=CPU)
    files = _tensors(folders["llama"])
    layers = [(name, module) for name, module in model.get_base_model().named_modules() if type(module).__name__ == "Linear8bitLt"]
    layers = [(name, getattr(module, "base_layer", module)) for name, module in layers]
    layers = {id(module): (name.removesuffix(".base_layer"), module) for name, module in layers}
    assert len(layers) == 2 * len(LINEARS)
    for name, module in layers.values():
        step = module.weight.SCB[:, None] / 127
        # bitsandbytes rounds the weights to float16 first.
        assert ((module.weight.data * step - files[f"{name}.weight"]).abs() <= step * 0.5 + 1e-3 * files[f"{name}.weight"].abs()).all()
    model(input_ids=torch.arange(3, 15)[None], labels=torch.arange(3, 15)[None]).loss.backward()
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert unsupported(model) is not None


def test_full_training_trains_everything_and_writes_nothing_to_the_files(folders):
    folder = folders["llama-tied"]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    model = load(spec_of(method="full", precision="bfloat16"), folder, device=CPU)
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    assert len(list(model.parameters())) == len(_tensors(folder))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=torch.arange(3, 15)[None], labels=torch.arange(3, 15)[None]).loss.backward()
    optimizer.step()
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == digests


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"dropout": 0.2}, {"bias": "all"}, {"bias": "lora_only"}, {"use_rslora": True}])
def test_every_kind_of_adapter_trains(folders, lora, quantization):
    model = load(spec_of(quantization=quantization, lora={"rank": 4, "alpha": 8.0, **lora}), folders["llama"], device=CPU)
    base = load_base(folders["llama"], dtype=torch.float32, quantization=Quantization(quantization), device=CPU)
    torch.testing.assert_close(_logits(model.eval()), _logits(base.eval()), rtol=1e-4, atol=1e-5)
    model.train()(input_ids=torch.arange(3, 15)[None], labels=torch.arange(3, 15)[None]).loss.backward()
    trained = {name: p.grad.norm() for name, p in model.named_parameters() if p.requires_grad}
    assert any(".bias" in name for name in trained) == ("bias" in lora)
    assert any("magnitude" in name for name in trained) == ("use_dora" in lora)
    assert all(norm > 0 for name, norm in trained.items() if "lora_B" in name)
    scaling = model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"]
    assert scaling == (4.0 if "use_rslora" in lora else 2.0)


def test_transposed_linear_layers_take_adapters(folders):
    for quantization in ("none", "nf4"):
        spec = spec_of(quantization=quantization, lora={"rank": 4, "target_modules": ["c_attn", "c_fc"]})
        model = load(spec, folders["gpt2"], device=CPU)
        model(input_ids=torch.arange(3, 15)[None], labels=torch.arange(3, 15)[None]).loss.backward()
        assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    with pytest.raises(InvalidArgumentError, match="c_attn, c_fc, c_proj"):
        load(spec_of(), folders["gpt2"], device=CPU)


def test_a_folder_without_a_model_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FailedPreconditionError, match="no causal language model"):
        load_base(tmp_path, dtype=torch.float32, quantization=Quantization.NF4, device=CPU)


def _folder(folders, tmp_path, *, without=None, config=None):
    """The Llama's folder in one file, less the tensor `without`, with other entries in its config.json."""
    tensors = _tensors(folders["llama"])
    tensors.pop(without, None)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folders["llama"] / "config.json").read_text()) | (config or {})))
    return tmp_path


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"without": "model.layers.1.mlp.up_proj.weight"}, r"lacks 1 of the weights .*, such as model.layers.1.mlp.up_proj.weight;"),
        ({"config": {"num_hidden_layers": 3}}, r"lacks 13 of the weights .*, such as model.layers.2.input_layernorm.weight;"),
        ({"config": {"vocab_size": 100}}, r"has (lm_head|model.embed_tokens).weight of shape \(96, 64\), wanted \(100, 64\) by its config"),
        ({"config": {"intermediate_size": 192}}, r"has model.layers.0.mlp.\w+.weight of shape .*128.* wanted .*192.* by its config.json"),
        ({"config": {"num_attention_heads": 3}}, "not a multiple of the number of attention heads"),
        ({"config": {"hidden_act": "nonsense"}}, "can be loaded: 'nonsense'"),
    ],
)
def test_nothing_is_trained_on_weights_that_the_files_do_not_have(folders, tmp_path, quantization, change, text):
    folder = _folder(folders, tmp_path, **change)
    with pytest.raises(FailedPreconditionError, match=text) as caught:
        load_base(folder, dtype=torch.float32, quantization=quantization, device=CPU)
    assert caught.value.code == "invalid_base_model"


def test_a_file_that_is_cut_off_is_an_error_that_says_so(folders, tmp_path):
    file = _folder(folders, tmp_path) / "model.safetensors"
    load_base(tmp_path, dtype=torch.float32, device=CPU)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FailedPreconditionError, match="can be loaded: .*not fully covered"):
        load_base(tmp_path, dtype=torch.float32, device=CPU)


def test_files_that_are_quantized_already_are_taken_as_what_they_are_and_nothing_else(folders, tmp_path):
    wanted = load_base(folders["llama"], dtype=torch.float32, quantization=Quantization.NF4, device=CPU)
    wanted.save_pretrained(tmp_path)
    again = load_base(tmp_path, dtype=torch.float32, quantization=Quantization.NF4, device=CPU)
    assert torch.equal(_logits(again.eval()), _logits(wanted.eval()))
    for quantization in (Quantization.NONE, Quantization.INT8):
        with pytest.raises(FailedPreconditionError, match=f"got {quantization.value}, but .* quantized as nf4") as caught:
            load_base(tmp_path, dtype=torch.float32, quantization=quantization, device=CPU)
        assert caught.value.param == "spec.quantization"


def test_a_configuration_that_says_null_of_its_quantization_is_of_plain_files(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    model = load_base(folder, dtype=torch.float32, quantization=Quantization.NF4, device=CPU)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantization_that_would_reach_little_is_refused(tmp_path, quantization):
    import transformers as t

    few = {key: value for key, value in SIZES.items() if key not in ("intermediate_size", "num_key_value_heads", "max_position_embeddings")}
    configs = {"falcon": (t.FalconConfig(**few), "0%"), "mixtral": (t.MixtralConfig(**SIZES, num_local_experts=4), r"1\d%")}
    for family, (config, share) in configs.items():
        t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
        with pytest.raises(FailedPreconditionError, match=f"got {quantization}, .* only {share} of this model's weights") as caught:
            load_base(tmp_path / family, dtype=torch.float32, quantization=Quantization(quantization), device=CPU)
        assert caught.value.param == "spec.quantization"


@pytest.mark.gpu
def test_nf4_is_quantized_while_loading_within_memory_and_time(tmp_path):
    """Two layers of an 8B model between its embedding and head. Limits: 16 GB in 15 s, and one 16-bit weight beside what stays."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = SIZES | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    del model
    torch.cuda.empty_cache()
    size_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    device = torch.device("cuda", 0)
    load_base(tmp_path, dtype=torch.bfloat16, quantization=Quantization.NF4, device=device)  # the page cache and CUDA are warm now
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, started_s = torch.cuda.memory_allocated(), time.perf_counter()
    model = load_base(tmp_path, dtype=torch.bfloat16, quantization=Quantization.NF4, device=device)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started_s
    stays, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert peak <= stays + 2.5 * 14336 * 4096 * 2
    assert size_bytes / seconds >= 16e9 / 15
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
