"""Replaced decoder layers under other drivers: the same losses, gradients and tokens as the family's own layers.

The judge of plain passes is transformers in float64 with a budget from its own error in float32; passes that are not plain are bit-equal.
"""

import copy
from typing import Any

import pytest
import torch

from finery_common.spec import TrainingSpec
from finery_trainer.engine import block, layers
from finery_trainer.engine.packing import pack
from finery_trainer.engine.stack import TrainingStack

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _config(family):
    import transformers as t

    window = {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    configs = {
        "llama": lambda: t.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "mistral": lambda: t.MistralConfig(**SIZES, sliding_window=5),
        "qwen2": lambda: t.Qwen2Config(**SIZES),
        "qwen3": lambda: t.Qwen3Config(**SIZES, head_dim=16),
        "gemma2": lambda: t.Gemma2Config(**SIZES, **window, query_pre_attn_scalar=24, attn_logit_softcapping=2.0),
        "gemma3": lambda: t.Gemma3TextConfig(**SIZES, **window),
        "phi3": lambda: t.Phi3Config(**SIZES),
        "granite": lambda: t.GraniteConfig(**SIZES, attention_multiplier=0.3, residual_multiplier=0.7),
        "smollm3": lambda: t.SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    }
    return configs[family]()


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite", "smollm3"]


def _model(family="llama", *, replaced=True, attention="eager", **sizes) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = _config(family)
    config.update(sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05))
    model.config.use_cache = False
    if replaced:
        assert layers.replace_layers(model) is None
    return model


def _lora(model, **options) -> Any:
    from peft import LoraConfig, get_peft_model

    names = LINEARS if hasattr(model.model.layers[0].mlp, "up_proj") else ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": names, "task_type": "CAUSAL_LM"} | options))
    _shake(model, seed=1)
    return model


def _shake(model, *, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def _pair(family="llama", *, lora=True, **options) -> tuple[Any, Any]:
    """(family's own, replaced and bound), the same weights."""
    own, bound = (_model(family, replaced=replaced) for replaced in (False, True))
    if lora:
        own, bound = (_lora(model, **options) for model in (own, bound))
    assert layers.bind_layers(bound) is None
    return own.train(), bound.train()


def _inputs(kind):
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if kind == "right padding":
        mask[0, 6:], mask[2, 1:] = 0, 0
    elif kind == "left padding":
        mask[0, :6], mask[1, :1] = 0, 0
    elif kind == "packed":
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
        return {"input_ids": ids, "position_ids": positions}
    return {"input_ids": ids} if kind == "none" else {"input_ids": ids, "attention_mask": mask}


def _loss(model, inputs):
    logits = model(**inputs).logits
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return (logits * weights).tanh()[mask.bool()].square().sum()


def _gradients(model, inputs):
    model.zero_grad()
    loss = _loss(model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _error(got, wanted):
    return float((got.detach().double() - wanted.detach()).norm() / (wanted.detach().norm() + 1e-12))


def _alone(model, inputs):
    """Loss and gradients of each row by itself, without padding."""
    model.zero_grad()
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    rows = [{name: x[row, mask[row]][None] for name, x in inputs.items() if name != "attention_mask"} for row in range(len(mask))]
    loss = torch.stack([_loss(model, row) for row in rows]).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _check(own, bound, inputs):
    exact_loss, exact = _alone(copy.deepcopy(own).double(), inputs)
    eager_loss, eager = _gradients(own, inputs)
    loss, got = _gradients(bound, inputs)
    assert abs(loss - exact_loss) <= 4 * abs(eager_loss - exact_loss) + 2e-6 * exact_loss
    assert got.keys() == exact.keys()
    for name, wanted in exact.items():
        assert _error(got[name], wanted) <= 4 * _error(eager[name], wanted) + 1e-6, name


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """Which passes went through the engine, in order."""
    seen: list[str] = []
    for name in ("forward", "backward"):
        plain = getattr(block.Block, name)
        monkeypatch.setattr(
            block.Block, name, lambda self, *a, _plain=plain, _name=name, **k: (seen.append(_name), _plain(self, *a, **k))[1]
        )
    return seen


@pytest.mark.parametrize("kind", ["none", "right padding", "left padding", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_get_the_gradients_of_the_familys_own_layers(family, kind, passes):
    own, bound = _pair(family)
    _check(own, bound, _inputs(kind))
    assert passes == ["forward"] * 2 + ["backward"] * 2


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_all_weights_get_the_gradients_of_the_familys_own_layers(family):
    own, bound = _pair(family, lora=False)
    _check(own, bound, _inputs("right padding"))


def test_trained_biases_and_norms_beside_adapters_get_their_gradients():
    own, bound = _pair(bias="lora_only")
    for model in (own, bound):
        model.get_submodule("base_model.model.model.layers.1.input_layernorm").requires_grad_(True)
    _check(own, bound, _inputs("left padding"))


def test_names_and_classes_are_the_familys():
    own, replaced = _model(replaced=False), _model()
    assert {n: tuple(p.shape) for n, p in own.named_parameters()} == {n: tuple(p.shape) for n, p in replaced.named_parameters()}
    layer, family = replaced.model.layers[0], type(own.model.layers[0])
    assert isinstance(layer, family)
    assert type(layer).__name__ == family.__name__


def test_gradient_checkpointing_keeps_less_and_changes_nothing(passes):
    _, bound = _pair()
    inputs, sizes = _inputs("right padding"), []

    def run():
        kept: list[int] = []
        # Saved tensors are packed when they are saved: parameters too, which are the same in both.
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
            loss = _loss(bound, inputs)
        sizes.append(sum(kept))
        bound.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in bound.parameters() if p.requires_grad]

    plain = run()
    bound.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    less = run()
    assert sizes[1] < 0.7 * sizes[0]
    assert passes == (["forward"] * 2 + ["backward"] * 2) * 2
    assert all(_error(a, b) < 1e-6 for a, b in zip(less, plain, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_pass_that_is_not_plain_is_checkpointed_as_the_family_does(use_reentrant, passes):
    own, bound = _pair()
    inputs = _inputs("right padding")
    inputs["attention_mask"][1, 4] = 0
    for model in (own, bound):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    (_, wanted), (_, got) = _gradients(own, inputs), _gradients(bound, inputs)
    assert not passes
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_checkpointing_by_the_driver_works():
    from torch.utils.checkpoint import checkpoint

    own, bound = _pair()
    _, wanted = _gradients(own, _inputs("none"))
    bound.zero_grad()
    checkpoint(lambda: _loss(bound, _inputs("none")), use_reentrant=False).backward()
    assert all(_error(p.grad, wanted[name]) < 1e-5 for name, p in bound.named_parameters() if p.requires_grad)


def test_hidden_states_are_recorded():
    own, bound = _pair()
    wanted, got = (model(**_inputs("none"), output_hidden_states=True).hidden_states for model in (own, bound))
    assert len(got) == 3
    assert all(_error(a, b) < 1e-5 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generate_gives_the_same_tokens(attention):
    inputs = _inputs("left padding")
    tokens = []
    for replaced in (False, True):
        model = _lora(_model(replaced=replaced, attention=attention)).eval()
        if replaced:
            assert layers.bind_layers(model) is None
        tokens += [model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=use_cache) for use_cache in (True, False)]
    assert all(torch.equal(other, tokens[0]) for other in tokens[1:])


@pytest.mark.parametrize(
    "case", ["cache", "attentions", "mask with holes", "four-dimensional mask", "dropout", "merged", "two adapters", "DoRA"]
)
def test_a_pass_that_is_not_plain_is_the_familys_own(case, passes):
    own, bound = _pair(**{"dropout": {"lora_dropout": 0.5}, "DoRA": {"use_dora": True}}.get(case, {}))
    inputs: dict[str, Any] = _inputs("right padding" if case == "mask with holes" else "none")
    for model in (own, bound):
        if case == "merged":
            model.merge_adapter()
        if case == "two adapters":
            torch.manual_seed(5)
            model.add_adapter("other", model.peft_config["default"])
            model.base_model.set_adapter(["default", "other"])
    inputs |= {"cache": {"use_cache": True}, "attentions": {"output_attentions": True}}.get(case, {})
    if case == "mask with holes":
        inputs["attention_mask"][1, 4] = 0
    if case == "four-dimensional mask":
        inputs["attention_mask"] = torch.zeros(3, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min)
    torch.manual_seed(7)
    wanted = own(**inputs)
    torch.manual_seed(7)
    got = bound(**inputs)
    assert not passes
    assert torch.equal(got.logits, wanted.logits)
    assert case != "attentions" or len(got.attentions) == 2


def test_autocast_to_another_type_is_the_familys_own(passes):
    own, bound = _pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, got = own(**_inputs("none")).logits, bound(**_inputs("none")).logits
    assert not passes
    assert torch.equal(got, wanted)


def test_adapters_take_turns_and_can_be_disabled(passes):
    own, bound = _pair()
    for model in (own, bound):
        model.add_adapter("ref", model.peft_config["default"])
        _shake(model, seed=2, scale=0.2)
    for model in (own, bound):
        for name, p in model.named_parameters():
            if ".ref." in name and "lora_A" in name:
                p.data.copy_(own.get_parameter(name).data)
    inputs, found = _inputs("right padding"), []
    for model in (own, bound):
        model.zero_grad()
        loss = _loss(model, inputs)
        with torch.no_grad():
            with model.disable_adapter():
                bare = model(**inputs).logits
            model.set_adapter("ref")
            ref = model(**inputs).logits
            model.set_adapter("default")
        loss.backward()
        mask = inputs["attention_mask"].bool()
        found.append([bare[mask], ref[mask], *(p.grad for name, p in model.named_parameters() if ".default." in name)])
    assert passes == ["forward"] * 6 + ["backward"] * 2
    assert all(_error(b, a) < 1e-5 for a, b in zip(*found, strict=True))
    assert _error(found[0][0], found[0][1]) > 1e-2


@pytest.mark.parametrize("lora", [True, False])
def test_optimizer_steps_are_seen(lora):
    pair = _pair(lora=lora)
    losses = []
    for model in pair:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = _loss(model, _inputs("none"))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][3] != pytest.approx(losses[0][0], rel=1e-2)


def test_weights_that_moved_end_the_binding_and_nothing_else(passes):
    own, bound = _pair()
    wanted = own(**_inputs("none")).logits
    ids = torch.arange(3, 12).numpy()
    TrainingStack(bound).loss(pack([(ids, ids)]))
    passes.clear()
    assert _error(bound(**_inputs("none")).logits, wanted) < 1e-5
    assert not passes
    assert layers.bind_layers(bound) is None
    assert _error(bound(**_inputs("none")).logits, wanted) < 1e-5
    assert passes
    passes.clear()
    layers.release_layers(bound)
    assert _error(bound(**_inputs("none")).logits, wanted) < 1e-5
    assert not passes


def test_a_copy_is_not_bound(passes):
    own, bound = _pair()
    copied = copy.deepcopy(bound)
    copied(**_inputs("none"))
    assert not passes
    assert _error(copied(**_inputs("none")).logits, own(**_inputs("none")).logits) < 1e-5


def test_a_second_backward_pass_is_refused():
    _, bound = _pair()
    loss = _loss(bound, _inputs("none"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_nf4_layers_are_bound_too(tmp_path, passes):
    from finery_trainer import engine

    # Where a row is no whole number of blocks, bitsandbytes dequantizes wrongly on a CPU.
    _model(replaced=False, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    spec = TrainingSpec.parse({"base_model": "tiny", "quantization": "nf4", "precision": "float32", "lora": {"rank": 4}})
    own, bound = (engine.load(spec, tmp_path, device=torch.device("cpu")) for _ in range(2))
    for model in (own, bound):
        _shake(model, seed=1)
    assert layers.bind_layers(bound) is None
    (loss, wanted), (bound_loss, got) = _gradients(own, _inputs("left padding")), _gradients(bound, _inputs("left padding"))
    assert passes == ["forward"] * 2 + ["backward"] * 2
    assert bound_loss == pytest.approx(loss, rel=1e-5)
    assert all(_error(got[name], wanted[name]) < 1e-5 for name in wanted)


def test_what_can_not_be_replaced_or_bound_says_why(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config

    from finery_trainer import engine

    gpt2: Any = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4))
    assert "gpt2" in (layers.replace_layers(gpt2) or "")
    assert "gpt2" in (layers.bind_layers(gpt2) or "")
    assert "not replaced" in (layers.bind_layers(_model(replaced=False)) or "")
    _model(replaced=False).save_pretrained(tmp_path)
    spec = TrainingSpec.parse({"base_model": "tiny", "quantization": "int8"})
    assert "Linear8bitLt" in (layers.bind_layers(engine.load(spec, tmp_path, device=torch.device("cpu"))) or "")


def _trl_pair() -> list[Any]:
    own, bound = _pair()
    return [own, bound]


def test_trls_dpo_gives_the_same_losses_and_gradients(passes):
    from finery_trainer.engine.dpo import pair_loss

    spec = TrainingSpec.parse({"base_model": "tiny", "method": "dpo"})
    inputs, found = _inputs("right padding"), []
    inputs = {name: torch.cat([tensor, tensor.flip(0)[:1]]) for name, tensor in inputs.items()}
    inputs["completion_mask"] = inputs["attention_mask"].clone()
    inputs["completion_mask"][:, :1] = 0
    for model in _trl_pair():
        loss = pair_loss(model, spec).of(inputs)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert passes == ["forward"] * 4 + ["backward"] * 2
    assert all(_error(b, a) < 1e-4 for a, b in zip(*found, strict=True))


def test_trls_sft_trainer_gives_the_same_losses_and_weights(tmp_path, passes):
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Trainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class PlainHeadTrainer(SFTTrainer):
        # TRL's own head computes in Triton, so on a GPU alone.
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return Trainer.compute_loss(self, *args, **kwargs)

    rows = [{"input_ids": _inputs("none")["input_ids"][i % 3, : 4 + i].tolist()} for i in range(6)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>", eos_token="<pad>"
    )
    found = []
    for index, model in enumerate(_trl_pair()):
        settings = SFTConfig(
            output_dir=str(tmp_path / str(index)), per_device_train_batch_size=2, max_steps=3, logging_steps=1, learning_rate=1e-3,
            report_to="none", save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = PlainHeadTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        found.append(
            ([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], [p for p in model.parameters() if p.requires_grad])
        )
    assert passes.count("backward") == 6
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert all(_error(b, a) < 1e-3 for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_bfloat16_layers_on_a_gpu_are_no_worse_than_the_familys_own(tmp_path, quantization):
    from finery_trainer import engine

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    _model(replaced=False, head_dim=64, vocab_size=1024, **sizes).save_pretrained(tmp_path)
    fields = {"base_model": "tiny", "quantization": quantization, "lora": {"rank": 8}}
    exact, own, bound = (
        engine.load(TrainingSpec.parse(fields | {"precision": precision}), tmp_path, device=torch.device("cuda"))
        for precision in ("float32", "bfloat16", "bfloat16")
    )
    for model in (exact, own, bound):
        _shake_on(model, like=exact)
    assert layers.bind_layers(bound) is None
    for kind in ("none", "right padding", "left padding", "packed"):
        inputs = {name: x.repeat_interleave(8, dim=0).cuda() for name, x in _inputs(kind).items()}
        _, wanted = _gradients(exact, inputs)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            (_, eager), (_, got) = _gradients(own, inputs), _gradients(bound, inputs)
        for name, gradient in wanted.items():
            assert _error(got[name], gradient) <= 1.5 * _error(eager[name], gradient) + 1e-3, (kind, name)


def _shake_on(model, *, like):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(like.get_parameter(name))
            elif "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
