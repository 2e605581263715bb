"""The split of an alias over its versions, as a function of weights and keys."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finery_gateway.resources import Alias, Canary, RouteTarget
from finery_gateway.splits import chosen, new_key, targets_of

# Callers of a running canary would change sides, were these to change.
IN_CANARY = [9, 14, 16, 20, 21, 24]

keys = st.text(max_size=64)
versions = st.text(min_size=1, max_size=64)
weights = st.integers(1, 99)


def split(weight: int, *, canary: str = "v2") -> tuple[RouteTarget, RouteTarget]:
    return RouteTarget(version="v1", weight=100 - weight), RouteTarget(version=canary, weight=weight)


def choose(targets, *, key: str) -> str:
    return chosen(targets, key=key).version


@settings(deadline=None)
@given(key=keys, weight=weights)
def test_a_key_stays_on_its_version_whatever_the_order(key, weight):
    targets = split(weight)
    assert choose(targets, key=key) == choose(targets, key=key) == choose(targets[::-1], key=key)


@settings(deadline=None)
@given(key=keys, less=weights, more=weights)
def test_a_canary_that_grows_keeps_its_callers_and_one_that_shrinks_gains_none(key, less, more):
    less, more = sorted((less, more))
    if choose(split(less), key=key) == "v2":
        assert choose(split(more), key=key) == "v2"
    if choose(split(more), key=key) == "v1":
        assert choose(split(less), key=key) == "v1"


@settings(deadline=None)
@given(key=keys, known=st.lists(versions, min_size=1, max_size=5, unique=True), added=versions, data=st.data())
def test_a_version_that_is_added_takes_keys_and_moves_none_between_others(key, known, added, data):
    targets = [RouteTarget(version=version, weight=data.draw(weights)) for version in known]
    before = choose(targets, key=key)
    after = choose([*targets, RouteTarget(version=added, weight=data.draw(weights))], key=key)
    assert after in (before, added)


@pytest.mark.parametrize("weight", [1, 10, 50, 99])
def test_weights_are_honoured(weight):
    draw = random.Random(17)
    num_keys = 20_000
    hits = sum(choose(split(weight), key=f"{draw.getrandbits(64):x}") == "v2" for _ in range(num_keys))
    # Five standard deviations of a binomial.
    assert abs(hits - num_keys * weight / 100) < 5 * (num_keys * weight / 100 * (1 - weight / 100)) ** 0.5


def test_a_higher_weight_moves_only_as_many_callers_as_it_must():
    callers = [f"user-{number}" for number in range(20_000)]
    moved = [choose(split(10), key=key) != choose(split(20), key=key) for key in callers]
    assert abs(sum(moved) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5


def test_every_canary_has_callers_of_its_own():
    callers = [f"user-{number}" for number in range(20_000)]
    both = [key for key in callers if choose(split(10), key=key) == "v2" and choose(split(10, canary="v3"), key=key) == "v3"]
    assert len(both) < 1500


def test_a_split_is_the_same_in_every_process_and_release():
    in_canary = [number for number in range(30) if choose(split(30), key=f"user-{number}") == "v2"]
    assert in_canary == IN_CANARY


def test_one_version_alone_answers_everybody():
    assert choose([RouteTarget(version="v1", weight=100)], key=new_key()) == "v1"
    assert {choose(split(50), key=new_key()) for _ in range(200)} == {"v1", "v2"}


def test_an_alias_has_the_targets_that_its_route_has():
    alias = Alias(name="projects/p/aliases/m", alias="m", version="v1")
    assert targets_of(alias) == (RouteTarget(version="v1", weight=100),)
    assert targets_of(alias.model_copy(update={"canary": Canary(version="v2", weight=30)})) == split(30)
