"""Packed batches: what goes where, padding that changes nothing, groups under a budget, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finery_common.errors import InvalidArgumentError
from finery_trainer.engine.graphs import in_buckets
from finery_trainer.engine.packing import IGNORE, groups, multiple_of_labels, pack, padded_tokens

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def rows_of(lengths, *, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        targets = np.where(rng.random(length) < 0.5, IGNORE, rng.integers(0, 50, length))
        rows.append((rng.integers(0, 50, length), targets))
    rows[0][1][0] = 7
    return rows


@given(lengths=LENGTHS, token_multiple=st.sampled_from([1, 8, 64]), label_multiple=st.sampled_from([1, 16]))
def test_a_pack_holds_every_row_once_and_padding_has_no_labels(lengths, token_multiple, label_multiple):
    rows = rows_of(lengths)
    batch = pack(rows, token_multiple=token_multiple, label_multiple=label_multiple)
    assert len(batch.input_ids_T) % token_multiple == 0
    assert len(batch.rows_L) % label_multiple == 0
    bounds = batch.cu_seqlens.tolist()
    assert bounds[-1] == len(batch.input_ids_T) == len(batch.positions_T)
    for (ids, _), start, stop in zip(rows, bounds[:-1], bounds[1:], strict=False):
        assert batch.input_ids_T[start : start + len(ids)].tolist() == ids.tolist()
        assert batch.positions_T[start:stop].tolist() == list(range(stop - start))
        assert stop - start == (len(ids) if len(rows) > 1 else len(batch.input_ids_T))
    targets = np.full(bounds[-1], IGNORE)
    kept = batch.targets_L != IGNORE
    targets[batch.rows_L[kept]] = batch.targets_L[kept]
    wanted = np.concatenate([each for _, each in rows])
    assert targets[: len(wanted)].tolist() == wanted.tolist()
    assert (targets[len(wanted) :] == IGNORE).all()
    assert batch.num_labels == int((wanted != IGNORE).sum()) == int(kept.sum())
    assert batch.num_tokens == len(wanted)
    assert max(np.diff(bounds)) == batch.max_seqlen
    assert (batch.lengths_equal is not None) == (len(set(np.diff(bounds).tolist())) == 1)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 100))
def test_groups_hold_every_row_once_within_the_budget_but_for_a_longer_row_alone(lengths, max_tokens):
    found = list(groups(lengths, max_tokens=max_tokens))
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[index] for index in group) <= max_tokens for group in found)


@given(st.integers(1, 1 << 20))
def test_padding_beside_a_gpu_is_an_eighth_at_most_and_little_for_large_packs(num_tokens):
    padded = padded_tokens(num_tokens)
    most = max(num_tokens * 9 / 8 + 1, num_tokens + 128) if num_tokens <= 8192 else num_tokens + 7
    assert num_tokens <= padded <= most
    assert padded_tokens(padded) == padded


def test_labels_of_small_packs_take_few_shapes():
    assert {multiple_of_labels(padded_tokens(num_tokens)) for num_tokens in range(1, 500)} == {128}
    for num_tokens in (600, 1100, 5000):
        padded = padded_tokens(num_tokens)
        assert padded == 4 * multiple_of_labels(padded)
    assert multiple_of_labels(8200) == 128


def test_bounds_in_buckets_end_with_empty_sequences():
    batch = in_buckets(pack(rows_of([5, 9, 3])))
    assert batch.cu_seqlens.tolist() == [0, 5, 14, 17] + [17] * 13
    assert (batch.max_seqlen, batch.cu_seqlens.dtype) == (512, torch.int32)
    equal = pack(rows_of([4, 4]))
    assert in_buckets(equal) is equal


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "got 0 rows"),
        ([(np.array([], dtype=np.int64), np.array([], dtype=np.int64))], "the shortest has 0 tokens"),
        ([(np.array([1, 2]), np.array([IGNORE, IGNORE]))], "got none that the loss is taken on"),
    ],
)
def test_nothing_to_learn_from_is_an_error_and_not_nan(rows, text):
    with pytest.raises(InvalidArgumentError, match=text):
        pack(rows)
