"""Models outside the engine's families: loss and gradients are transformers', by any split of rows, in tiles where the head allows.

The judge is transformers in float64, each row by itself; the budget is transformers' own error in float32.
"""

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_common.spec import TrainingSpec
from finery_trainer import engine
from finery_trainer.engine.determinism import deterministic_operations
from finery_trainer.engine.generic import GenericPasses, GenericStack, find_plain_head
from finery_trainer.engine.packing import IGNORE, pack
from finery_trainer.engine.stack import TrainingStack

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _config(family):
    import transformers as t

    opt = {"ffn_dim": 48, "word_embed_proj_dim": 16}
    mamba = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
    configs = {
        "gpt2": lambda: t.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(**SIZES),
        "opt": lambda: t.OPTConfig(**SIZES, **opt, dropout=0.0),
        "phi": lambda: t.PhiConfig(**GROUPED),
        "cohere": lambda: t.CohereConfig(**GROUPED, logit_scale=0.3),
        "gemma2": lambda: t.Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=2.0),
        "granite": lambda: t.GraniteConfig(**GROUPED, logits_scaling=3.0),
        "mixtral": lambda: t.MixtralConfig(**GROUPED, num_local_experts=4),
        "mamba": lambda: t.MambaConfig(**mamba, state_size=4),
        "falcon_h1": lambda: t.FalconH1Config(
            **GROUPED, lm_head_multiplier=0.4, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
        ),
    }
    return configs[family]()


TILED = ["gpt2", "gpt_neox", "opt", "cohere", "gemma2", "granite", "mixtral", "mamba", "falcon_h1"]
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value"],
    "opt": ["q_proj", "fc1"],
    "mamba": ["in_proj"],
    "falcon_h1": ["up_proj"],
}


def _model(family) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(family), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.config.use_cache = False
    # What Mixtral takes otherwise has no float64.
    model.config._experts_implementation = "eager"
    return model


def _lora(model, family, **options) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = TARGETS.get(family, ["q_proj", "v_proj"])
    options = {"r": 4, "lora_alpha": 12, "target_modules": targets, "task_type": "CAUSAL_LM", "fan_in_fan_out": family == "gpt2"} | options
    model = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


def _rows(seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for length in (11, 1, 7, 16):
        ids = rng.integers(3, VOCAB, length)
        targets = np.append(ids[1:], IGNORE)
        targets[rng.random(length) < 0.3] = IGNORE
        rows.append((ids, targets))
    return rows


def _num_labels(rows):
    return sum(int((targets != IGNORE).sum()) for _, targets in rows)


def _transformers(model, rows):
    """Mean loss over labels and its gradients, each row by itself."""
    losses = []
    for ids, targets in rows:
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses.append(functional.cross_entropy(logits, torch.from_numpy(targets), ignore_index=IGNORE, reduction="sum"))
    loss = torch.stack(losses).sum() / _num_labels(rows)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _error(got, wanted):
    got, wanted = (torch.zeros(1) if x is None else x.detach().double() for x in (got, wanted))
    return float((got - wanted).norm() / (wanted.norm() + 1e-12))


def _stack_gradients(stack, model, parts, *, num_labels):
    stack.zero_grad()
    loss = sum(stack.forward_backward(part, num_labels=num_labels).item() for part in parts)
    return loss, {name: stack.gradient_of(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def _check(model, rows, parts, *, is_tiled):
    exact_loss, exact = _transformers(copy.deepcopy(model).double(), rows)
    eager_loss, eager = _transformers(copy.deepcopy(model), rows)
    stack = GenericStack(model)
    assert (stack.head is not None) == is_tiled
    for _ in range(2):
        loss, got = _stack_gradients(stack, model, parts, num_labels=_num_labels(rows))
        assert abs(loss - exact_loss) <= 4 * abs(eager_loss - exact_loss) + 2e-6 * exact_loss
        assert got.keys() == exact.keys()
        for name, wanted in exact.items():
            assert _error(got[name], wanted) <= 4 * _error(eager[name], wanted) + 2e-6, name


@pytest.mark.parametrize("family", [*TILED, "phi"])
def test_adapters_get_the_gradients_of_transformers(family):
    rows = _rows()
    _check(_lora(_model(family), family).train(), rows, [rows], is_tiled=family != "phi")


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "phi"])
def test_all_weights_get_the_gradients_of_transformers(family):
    rows = _rows()
    _check(_model(family).train(), rows, [rows[:1], rows[1:3], rows[3:]], is_tiled=family != "phi")


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_with_an_adapter_is_not_tiled(options):
    rows = _rows()
    _check(_lora(_model("granite"), "granite", **options).train(), rows, [rows], is_tiled=False)


@pytest.mark.parametrize(
    ("family", "scale", "softcap"), [("granite", 1 / 3, None), ("cohere", 0.3, None), ("gemma2", 1.0, 2.0), ("falcon_h1", 0.4, None)]
)
def test_the_heads_form_is_found(family, scale, softcap):
    head = find_plain_head(_model(family))
    assert head is not None
    assert (head.scale, head.softcap) == (pytest.approx(scale), softcap)


def test_a_head_of_unknown_form_is_not_tiled():
    model = _model("granite")
    plain = type(model).forward

    def shifted(self: Any, **inputs: Any) -> Any:
        output = plain(self, **inputs)
        output.logits = output.logits + 0.01
        return output

    model.__class__ = type("Shifted", (type(model),), {"forward": shifted})
    assert find_plain_head(model) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", TILED)
def test_the_form_is_found_in_16_bits_too(family, dtype):
    head = find_plain_head(_model(family).to(dtype))
    assert head is not None


def test_gradients_are_those_of_the_engines_own_layers():
    model, rows = _lora(_model("granite"), "granite"), _rows()
    _, wanted = _stack_gradients(GenericStack(own := copy.deepcopy(model)), own, [rows], num_labels=_num_labels(rows))
    _, got = _stack_gradients(TrainingStack(model), model, [pack(rows)], num_labels=_num_labels(rows))
    assert all(_error(got[name], wanted[name]) < 1e-5 for name in wanted)


def test_dropout_is_off_in_the_loss_alone_and_modes_are_left_as_they_were():
    model, rows = _lora(_model("gpt_neox"), "gpt_neox", lora_dropout=0.5).train(), _rows()
    stack = GenericStack(model)
    assert model.training
    losses = [stack.loss(rows).item() for _ in range(2)]
    torch.manual_seed(0)
    trained = [stack.forward_backward(rows, num_labels=1).item() for _ in range(2)]
    assert model.training
    assert losses[0] == losses[1]
    assert len({*trained, losses[0]}) == 3


def test_rows_without_labels_add_nothing():
    model, rows = _lora(_model("gpt_neox"), "gpt_neox"), _rows()[1:2]
    rows[0][1][:] = IGNORE
    stack = GenericStack(model)
    assert stack.forward_backward(rows, num_labels=3).item() == 0
    assert stack.loss(rows).item() == 0
    assert all(not group.grads_N.any() for group in stack.groups)


def test_16_bit_weights_keep_float32_sums_of_adapters_and_vectors():
    rows = _rows()
    model = _model("gpt_neox").to(torch.bfloat16)
    stack = GenericStack(model)
    loss, got = _stack_gradients(stack, model, [rows], num_labels=_num_labels(rows))
    exact_loss, exact = _transformers(copy.deepcopy(model).double(), rows)
    assert loss == pytest.approx(exact_loss, rel=2e-2)
    assert {name: p.dtype for name, p in got.items()} == {
        name: torch.bfloat16 if p.dim() > 1 else torch.float32 for name, p in model.named_parameters()
    }
    assert all(_error(got[name], exact[name]) < 0.1 for name in exact if exact[name].norm() > 1e-3)
    assert all(p.grad is None for p in model.parameters() if p.dim() == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_is_a_switch_that_changes_no_number(dtype):
    model, rows = _model("mixtral").to(dtype).train(), _rows()
    found, kept = [], []
    for is_checkpointed in (False, True, None, False):
        stack = GenericStack(model, is_checkpointed=is_checkpointed)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x):
            found.append(_stack_gradients(stack, model, [rows], num_labels=_num_labels(rows)))
        kept.append(sum(sizes))
    assert kept[1] == kept[2]
    assert kept[3] == kept[0]
    for loss, gradients in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(gradients[name], wanted) for name, wanted in found[0][1].items())


def test_an_optimizer_of_another_driver_moves_the_same_parameters():
    model, rows = _lora(_model("opt"), "opt").train(), _rows()
    stack = GenericStack(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad(set_to_none=True)
        stack.zero_grad()
        losses.append(stack.forward_backward(rows, num_labels=_num_labels(rows)).item())
        optimizer.step()
        stack.refresh()
    assert losses == sorted(losses, reverse=True)
    assert stack.loss(rows).item() / _num_labels(rows) < losses[-1]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_models_train(tmp_path, quantization):
    _model("gpt_neox").save_pretrained(tmp_path)
    spec = TrainingSpec.parse(
        {
            "base_model": "tiny",
            "quantization": quantization,
            "lora": {"target_modules": ["query_key_value"], "use_dora": quantization == "nf4"},
        }
    )
    model, rows = engine.load(spec, tmp_path, device=torch.device("cpu")), _rows()
    stack = GenericStack(model)
    assert stack.head is not None
    stack.forward_backward(rows, num_labels=_num_labels(rows))
    assert all(stack.gradient_of(p).norm() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_an_int8_model_with_checkpointing_holds_no_layers_inputs_until_the_backward_pass(tmp_path):
    """Each of 4 layers has two products whose inputs are 48 wide, the middle of its MLP."""
    import transformers as t

    t.LlamaForCausalLM(t.LlamaConfig(**GROUPED | {"num_hidden_layers": 4})).save_pretrained(tmp_path)
    spec = TrainingSpec.parse({"base_model": "tiny", "quantization": "int8", "lora": {"rank": 4}})
    model = engine.load(spec, tmp_path, device=torch.device("cpu"))
    model.train()
    ids = torch.arange(1, 41).reshape(1, 40) % VOCAB

    def kept() -> int:
        gc.collect()
        return sum(type(item) is torch.Tensor and item.shape in ((40, 48), (1, 40, 48)) for item in gc.get_objects())

    losses = []
    for is_checkpointed in (False, True):
        GenericStack(model, is_checkpointed=is_checkpointed)
        loss = model(input_ids=ids, labels=ids).loss
        assert (kept() == 0) == is_checkpointed
        loss.backward()
        losses.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    (plain, plain_gradients), (checkpointed, gradients) = losses
    assert checkpointed == plain
    assert all(torch.equal(one, other) for one, other in zip(plain_gradients, gradients, strict=True))


def _spec(**fields) -> TrainingSpec:
    return TrainingSpec.parse({"base_model": "tiny", "max_sequence_length": 16, **fields})


def test_4_bit_weights_that_bitsandbytes_misreads_are_refused(tmp_path):
    spec = _spec(quantization="nf4", lora={"target_modules": ["query_key_value"]})
    for hidden_size in (64, 96):
        import transformers as t

        folder = tmp_path / str(hidden_size)
        t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES | {"hidden_size": hidden_size, "intermediate_size": 64})).save_pretrained(folder)
        model = engine.load(spec, folder, device=torch.device("cpu"))
        if hidden_size == 64:
            assert GenericPasses(model, spec).gradients(_rows()).isfinite()
        else:
            with pytest.raises(FailedPreconditionError, match=r"query_key_value.* has 96 inputs, no multiple of 64.*use none or int8"):
                GenericPasses(model, spec)


@pytest.mark.parametrize(("max_tokens", "wanted"), [(None, [(4, 16)]), (32, [(2, 16), (2, 7)]), (16, [(1, 16), (1, 11), (2, 7)])])
def test_a_pass_has_at_most_so_many_tokens_and_the_gradient_is_the_same(max_tokens, wanted, monkeypatch):
    model, rows = _lora(_model("gpt_neox"), "gpt_neox"), _rows()
    passes = GenericPasses(model, _spec(batch={"micro_batch_size": 4, "max_tokens": max_tokens}))
    seen: list[tuple[int, int]] = []
    plain = GenericStack.forward_backward

    def noted(stack, part, **options):
        seen.append((len(part), max(len(ids) for ids, _ in part)))
        return plain(stack, part, **options)

    monkeypatch.setattr(GenericStack, "forward_backward", noted)
    loss = passes.gradients(rows)
    assert seen == wanted
    assert all(count * width <= (max_tokens or 64) for count, width in seen)
    other = copy.deepcopy(model)
    exact_loss, exact = _transformers(other.double(), rows)
    assert loss.item() == pytest.approx(exact_loss, rel=1e-5)
    assert all(_error(passes.stack.gradient_of(p), exact[name]) < 1e-4 for name, p in model.named_parameters() if name in exact)


def test_a_step_without_labels_or_rows_is_an_error_and_no_nan():
    passes = GenericPasses(_lora(_model("gpt_neox"), "gpt_neox"), _spec())
    rows = [(ids, np.full_like(targets, IGNORE)) for ids, targets in _rows()]
    for given in (rows, []):
        with pytest.raises(InvalidArgumentError, match=f"got {len(given)} rows and no token that the loss is taken on"):
            passes.gradients(given)


def test_a_memory_budget_that_cannot_be_kept_is_refused():
    with pytest.raises(FailedPreconditionError, match=r"memory.budget: got 8GiB, but .* not planned") as caught:
        GenericPasses(_lora(_model("gpt_neox"), "gpt_neox"), _spec(memory={"budget": "8GiB"}))
    assert caught.value.param == "spec.memory.budget"


@pytest.mark.parametrize(("deterministic", "wanted"), [(True, True), (False, False), (None, False)])
def test_on_a_gpu_determinism_is_switched_on_where_it_is_asked_for_and_off_again(deterministic, wanted):
    with deterministic_operations(_spec(deterministic=deterministic), torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled() == wanted
    assert not torch.are_deterministic_algorithms_enabled()
    text = "cumsum_cuda_kernel does not have a deterministic implementation, but you set"
    with (
        pytest.raises(FailedPreconditionError if wanted else RuntimeError, match="cumsum_cuda_kernel"),
        deterministic_operations(_spec(deterministic=deterministic), torch.device("cuda")),
    ):
        raise RuntimeError(text)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_model_that_cannot_compute_with_quantized_weights_says_so(tmp_path):
    import transformers as t

    t.MambaForCausalLM(t.MambaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=1, state_size=4)).save_pretrained(tmp_path)
    spec = _spec(quantization="nf4", lora={"target_modules": ["in_proj"]})
    with pytest.raises(FailedPreconditionError, match="got nf4, but this model cannot compute with quantized weights") as caught:
        GenericPasses(engine.load(spec, tmp_path, device=torch.device("cpu")), spec)
    assert caught.value.param == "spec.quantization"
