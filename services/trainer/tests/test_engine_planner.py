"""Memory plans: what fits, what is preferred, how they grow with memory, and what is said when nothing fits."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import psutil
import pytest
import torch

from finery_common.errors import ResourceExhaustedError
from finery_common.spec import TrainingSpec
from finery_trainer.engine.architecture import describe
from finery_trainer.engine.block import RECOMPUTABLE
from finery_trainer.engine.passes import host_bytes, is_capturable
from finery_trainer.engine.planner import Ranks, Workload, keep_all, plan_step

GIB = 1 << 30


@pytest.fixture(scope="module")
def shape():
    """Llama-3.1-8B's."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    return describe(LlamaConfig(**sizes, vocab_size=128256))


def work(num_tokens=16384, longest=2048, *, quantized=True):
    ranks = Ranks(qkv=96, o=32, gate_up=64, down=32)
    return Workload(num_tokens=num_tokens, longest_row=longest, mean_row=longest, ranks=ranks, is_quantized=quantized)


def test_with_room_for_all_nothing_is_recomputed_and_a_step_is_one_pass(shape):
    plan = plan_step(shape, work(), card_bytes=100 * GIB)
    assert all(names == set(RECOMPUTABLE) for names in plan.card)
    assert plan.pack_tokens == 16384
    assert not any(plan.host)
    assert len(plan.resident) == 4 * 32
    assert plan.card == keep_all(32).card


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("num_tokens", "longest"), [(16384, 2048), (8192, 8192), (32768, 32768), (1104, 400)])
@pytest.mark.parametrize("host_gib", [0, 60])
def test_a_plan_keeps_to_its_budgets_and_more_memory_is_never_slower(shape, quantized, num_tokens, longest, host_gib):
    steps = []
    for card_gib in (1, 2, 4, 8, 16, 32, 64, 100):
        try:
            plan = plan_step(shape, work(num_tokens, longest, quantized=quantized), card_bytes=card_gib * GIB, host_bytes=host_gib * GIB)
        except ResourceExhaustedError:
            assert not steps
            continue
        assert plan.card_bytes <= card_gib * GIB
        assert plan.host_bytes <= host_gib * GIB
        assert not any(card & host for card, host in zip(plan.card, plan.host, strict=True))
        steps.append(plan.step_s)
    assert len(steps) >= 3
    assert all(later <= earlier * 1.01 for earlier, later in itertools.pairwise(steps))


def test_long_rows_keep_attention_first(shape):
    plan = plan_step(shape, work(131072, 131072), card_bytes=33 * GIB, host_bytes=100 * GIB)
    assert all("o" in card | host for card, host in zip(plan.card, plan.host, strict=True))


def test_a_fixed_pack_is_kept(shape):
    assert plan_step(shape, work(), card_bytes=50 * GIB, pack_tokens=4096).pack_tokens == 4096
    assert plan_step(shape, work(), card_bytes=50 * GIB, pack_tokens=100).pack_tokens == 2048


def test_too_little_memory_is_an_error_that_says_what_would_do(shape):
    with pytest.raises(ResourceExhaustedError, match=r"got 0\.10 GiB for activations, wanted at least .* rows of 2048 tokens") as caught:
        plan_step(shape, work(), card_bytes=GIB // 10)
    assert (caught.value.code, caught.value.param) == ("out_of_memory", "spec.memory.budget")


def test_small_packs_are_captured_where_a_pass_fits_twice_and_large_ones_never(shape):
    short = work(1104, 1501)
    assert plan_step(shape, short, card_bytes=40 * GIB, host_bytes=60 * GIB, is_capturable=True).is_graphed
    assert not plan_step(shape, short, card_bytes=40 * GIB, host_bytes=60 * GIB).is_graphed
    assert not plan_step(shape, work(32768, 32768), card_bytes=400 * GIB, is_capturable=True).is_graphed


@pytest.mark.parametrize("card_gib", [1, 2, 4, 10, 30])
def test_a_captured_pass_counts_twice_and_waits_for_no_host(shape, card_gib):
    plan = plan_step(shape, work(1104, 1501), card_bytes=card_gib * GIB, host_bytes=60 * GIB, is_capturable=True)
    assert plan.card_bytes <= card_gib * GIB
    if plan.is_graphed:
        assert not any(plan.host)
        assert plan.card_bytes == 2 * (plan.activation_bytes + plan.workspace_bytes) + plan.resident_bytes


def test_the_longest_rows_train_on_cards_of_24_and_80_gigabytes(shape):
    """With 80 GiB of pinned memory, beside 6.1 GiB of QLoRA's weights, adapters and states, 0.75 GiB of CUDA's own, 0.5 GiB left free."""
    for card_gib, num_tokens in ((24, 100_000), (80, 500_000)):
        room = card_gib - 0.75 - 0.5 - 6.1
        plan = plan_step(shape, work(num_tokens, num_tokens), card_bytes=int(room * GIB), host_bytes=80 * GIB)
        assert plan.card_bytes <= room * GIB


def test_a_deterministic_plan_does_not_depend_on_what_others_hold_or_on_how_passes_were_launched(shape, monkeypatch):
    def may_pin(available_gib, **fields):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available_gib * GIB))
        return host_bytes(TrainingSpec.parse({"base_model": "m", **fields}))

    assert (may_pin(60), may_pin(90)) == (30 * GIB, 45 * GIB)
    assert may_pin(60, deterministic=True) == may_pin(90, deterministic=True) == 0
    assert may_pin(60, deterministic=True, memory={"host_budget_bytes": 5}) == 5
    captured = [is_capturable(shape, capability=(9, 0), dtype=torch.bfloat16, is_deterministic=each) for each in (False, True)]
    assert captured == [True, False]
