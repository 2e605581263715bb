"""Which replica ought to hold which version, as a function of what is wanted and how much room there is."""

from hypothesis import given
from hypothesis import strategies as st

from finery_serving.placement import Wanted, place, ranked

names = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5, unique=True)
rates = st.lists(st.floats(0, 1e4), max_size=12)


def wanted(*rates: float) -> list[Wanted]:
    return [Wanted(f"v{number}", f"p/m{number}", rate) for number, rate in enumerate(rates)]


@given(replicas=names, size=st.integers(1, 6), rates=rates)
def test_room_is_kept_to_and_all_of_it_used(replicas, size, rates):
    placed = place(wanted(*rates), room=dict.fromkeys(replicas, size))
    for replica in replicas:
        assert sum(replica in found for found in placed.values()) == min(size, len(rates))
    assert all(len(set(found)) == len(found) for found in placed.values())


@given(replicas=names, size=st.integers(1, 6), rates=rates)
def test_every_version_has_a_copy_before_any_has_two(replicas, size, rates):
    placed = place(wanted(*rates), room=dict.fromkeys(replicas, size))
    if len(rates) <= size * len(replicas) and any(len(found) > 1 for found in placed.values()):
        assert all(placed.values())


def test_what_is_asked_for_most_has_the_most_copies():
    placed = place(wanted(1.0, 64.0, 1.0, 1.0), room=dict.fromkeys("abcdef", 1))
    assert [len(placed[f"v{number}"]) for number in range(4)] == [1, 3, 1, 1]


def test_what_there_is_no_room_for_is_what_is_asked_for_least_and_never_what_is_pinned():
    placed = place([Wanted("cold", "p/cold", is_pinned=True), *wanted(3.0, 9.0)], room={"a": 2})
    assert placed == {"cold": ("a",), "v0": (), "v1": ("a",)}


def test_requests_that_are_about_as_many_as_before_move_nothing():
    room = {"a": 2, "b": 2, "c": 1}
    assert place(wanted(10.0, 3.1, 1.0), room=room) == place(wanted(9.0, 3.4, 1.2), room=room)


def test_the_next_version_of_an_alias_lands_where_the_one_before_it_is():
    room = dict.fromkeys("abcdef", 2)
    others = [Wanted(f"o{number}", f"p/o{number}") for number in range(6)]
    before = place([*others, Wanted("v1", "p/m")], room=room)["v1"][0]
    both = place([Wanted("v2", "p/m", is_pinned=True), *others, Wanted("v1", "p/m")], room=room)
    assert both["v2"][0] == before


def test_a_replica_that_goes_moves_only_what_lay_on_it():
    keys = [f"p/m{number}" for number in range(200)]
    before = {key: ranked(key, "abcd")[0] for key in keys}
    after = {key: ranked(key, "abc")[0] for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != "d")
    assert {before[key] for key in keys} == set("abcd")
