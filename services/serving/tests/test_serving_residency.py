"""Which versions are held, and who has to make room, against a vLLM that is only counted."""

import asyncio
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from finery_common.errors import FailedPreconditionError, UnavailableError
from finery_serving.changes import Changes
from finery_serving.residency import Residency
from finery_serving.vllm_client import LoadedAdapter, ReplicaState


class Vllm:
    """Process and client at once: what vLLM and our middleware would hold."""

    def __init__(self):
        self.runtime = SimpleNamespace(replica_id="r")
        self.start()
        self.in_flight = Counter()
        self.loads, self.refuses = [], set()
        self.answers_get_lost = False

    def start(self):
        self.generation = getattr(self, "generation", 0) + 1
        self.ready = True
        self.adapters, self.admitted, self.engine = {}, set(), set()

    async def state(self):
        return ReplicaState(frozenset(self.admitted), dict(self.in_flight), dict(self.adapters))

    async def load(self, version, *, path):
        if not self.ready:
            raise UnavailableError("gone")
        if version in self.refuses:
            raise FailedPreconditionError("no")
        if version in self.adapters:
            raise FailedPreconditionError("already loaded")
        self.loads.append(version)
        self.adapters[version] = LoadedAdapter(len(self.loads), str(path))
        self.engine.add(len(self.loads))

    async def unload(self, version, *, adapter_id):
        assert not self.in_flight[version]
        assert version not in self.admitted
        self.adapters.pop(version, None)
        if self.answers_get_lost:
            raise UnavailableError("the answer was lost")
        self.engine.discard(adapter_id)

    async def admit(self, version):
        if version not in self.adapters:
            raise FailedPreconditionError("no adapter is registered so")
        self.admitted.add(version)
        if self.answers_get_lost:
            raise UnavailableError("the answer was lost")
        return self.adapters[version]

    async def retire(self, version):
        self.admitted.discard(version)
        return self.in_flight[version]


@pytest.fixture
def vllm():
    return Vllm()


@pytest.fixture
def residency(vllm):
    return Residency(vllm, client=vllm, max_resident=2, changes=Changes())


async def ensure(residency, *versions, wait_s=0.0):
    for version in versions:
        await residency.ensure(version, path=Path("/cache") / version, deadline_s=time.monotonic() + wait_s)


async def test_a_version_is_loaded_once_and_admitted(vllm, residency):
    await asyncio.gather(*(ensure(residency, "a") for _ in range(5)))
    assert vllm.loads == ["a"]
    assert vllm.admitted == {"a"}
    assert residency.serves("a")
    assert residency.paths == (Path("/cache/a"),)


async def test_the_one_used_longest_ago_makes_room_and_comes_back(vllm, residency):
    await ensure(residency, "a", "b")
    assert residency.serves("a")
    await ensure(residency, "c")
    assert set(vllm.adapters) == vllm.admitted == {"a", "c"}
    assert residency.state_of("b") == "cold"
    await ensure(residency, "b")
    assert vllm.loads == ["a", "b", "c", "b"]
    assert len(vllm.engine) == 2


async def test_a_busy_version_stays_and_the_newcomer_waits(vllm, residency):
    await ensure(residency, "a", "b")
    vllm.in_flight.update(a=1, b=1)
    with pytest.raises(UnavailableError):
        await ensure(residency, "c")
    assert vllm.admitted == {"a", "b"}
    waiting = asyncio.create_task(ensure(residency, "c", wait_s=10))
    vllm.in_flight.clear()
    await waiting
    assert vllm.admitted == {"b", "c"}


async def test_a_pinned_version_does_not_make_room(vllm, residency):
    await ensure(residency, "a", "b")
    with residency.pinned("a"):
        await ensure(residency, "c")
    assert vllm.admitted == {"a", "c"}


async def test_a_version_that_is_kept_makes_no_room_until_it_is_kept_no_longer(vllm, residency):
    await ensure(residency, "a", "b")
    residency.keep({"a"})
    await ensure(residency, "c")
    assert vllm.admitted == {"a", "c"}
    vllm.in_flight["c"] = 1
    with pytest.raises(UnavailableError):
        await ensure(residency, "d")
    residency.keep(())
    await ensure(residency, "d")
    assert vllm.admitted == {"c", "d"}


async def test_a_version_that_is_kept_is_dropped_all_the_same(vllm, residency):
    await ensure(residency, "a")
    residency.keep({"a"})
    await residency.drop("a")
    assert residency.versions == ()


async def test_what_is_refused_stays_for_its_last_request_and_a_pin_keeps_it_from_being_refused(vllm, residency):
    await ensure(residency, "a")
    with residency.pinned("a"):
        await residency.refuse(["a"])
        assert vllm.admitted == {"a"}
    await residency.refuse(["a"])
    assert (vllm.admitted, residency.versions, residency.state_of("a")) == (set(), ("a",), "draining")
    await ensure(residency, "a")
    assert (vllm.loads, vllm.admitted) == (["a"], {"a"})
    await residency.refuse(["cold"])


@pytest.fixture
async def load_under_way(vllm, residency, monkeypatch):
    """`a` is loaded; `b` is being loaded, by the task, until the event."""
    await ensure(residency, "a")
    load, begun, goes_on = vllm.load, asyncio.Event(), asyncio.Event()

    async def load_slowly(version, *, path):
        begun.set()
        await goes_on.wait()
        await load(version, path=path)

    monkeypatch.setattr(vllm, "load", load_slowly)
    task = asyncio.create_task(ensure(residency, "b"))
    await begun.wait()
    return task, goes_on


async def test_refusing_waits_only_a_moment_for_a_load(vllm, residency, load_under_way):
    task, goes_on = load_under_way
    async with asyncio.timeout(5):
        await residency.refuse(["a"])
    assert vllm.admitted == {"a"}
    goes_on.set()
    await task
    await residency.refuse(["a"])
    assert vllm.admitted == {"b"}


async def test_what_was_wanted_again_meanwhile_is_not_refused(vllm, residency, load_under_way, monkeypatch):
    task, goes_on = load_under_way
    monkeypatch.setattr("finery_serving.residency._REFUSE_S", 30.0)
    refusing = asyncio.create_task(residency.refuse(["a"]))
    await asyncio.sleep(0)
    with residency.pinned("a"):
        pass
    goes_on.set()
    await asyncio.gather(task, refusing)
    assert vllm.admitted == {"a", "b"}
    assert residency.serves("a")


async def test_refusing_waits_for_vllm_to_hear_of_a_drop_that_is_under_way(vllm, residency, monkeypatch):
    await ensure(residency, "a")
    vllm.in_flight["a"] = 1
    retire, begun = vllm.retire, asyncio.Event()

    async def retire_slowly(version):
        begun.set()
        await asyncio.sleep(0.1)
        return await retire(version)

    monkeypatch.setattr(vllm, "retire", retire_slowly)
    dropping = asyncio.create_task(residency.drop("a"))
    await begun.wait()
    assert vllm.admitted == {"a"}
    await residency.refuse(["a"])
    assert vllm.admitted == set()
    vllm.in_flight.clear()
    await dropping


async def test_a_dropped_version_goes_after_its_last_request(vllm, residency):
    await ensure(residency, "a")
    vllm.in_flight["a"] = 1
    dropping = asyncio.create_task(residency.drop("a"))
    while residency.serves("a") or vllm.admitted:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert residency.state_of("a") == "draining"
    assert "a" in vllm.adapters
    vllm.in_flight.clear()
    await dropping
    assert vllm.adapters == {}
    assert vllm.engine == set()
    assert residency.versions == ()


async def test_a_draining_version_that_is_wanted_again_stays_loaded(vllm, residency):
    await ensure(residency, "a")
    vllm.in_flight["a"] = 1
    dropping = asyncio.create_task(residency.drop("a"))
    while vllm.admitted:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await ensure(residency, "a")
    await dropping
    assert vllm.admitted == {"a"}
    assert vllm.loads == ["a"]


async def test_a_version_that_is_being_rolled_out_again_is_not_dropped(vllm, residency):
    await ensure(residency, "a")
    with residency.pinned("a"):
        await residency.drop("a")
        assert vllm.admitted == {"a"}
    loading, was_loading = asyncio.Event(), vllm.load

    async def load(version, *, path):
        await loading.wait()
        await was_loading(version, path=path)

    vllm.load = load
    other = asyncio.create_task(ensure(residency, "b"))
    while not residency._lock.locked():  # noqa: ASYNC110
        await asyncio.sleep(0)
    dropping = asyncio.create_task(residency.drop("a"))
    while not residency._draining:  # noqa: ASYNC110
        await asyncio.sleep(0)
    with residency.pinned("a"):
        # The whole rollout while the drop waits for its turn.
        assert residency.serves("a")
    loading.set()
    await asyncio.gather(other, dropping)
    assert vllm.admitted == {"a", "b"}
    await residency.drop("a")
    assert vllm.admitted == {"b"}


async def test_a_refused_version_is_failed_and_nothing_else_is_touched(vllm, residency):
    await ensure(residency, "a")
    vllm.refuses.add("bad")
    with pytest.raises(FailedPreconditionError):
        await ensure(residency, "bad")
    assert (residency.state_of("bad"), residency.state_of("a")) == ("failed", "loaded")


async def test_a_vllm_that_was_started_anew_holds_nothing(vllm, residency):
    await ensure(residency, "a", "b")
    vllm.ready = False
    assert residency.versions == ()
    with pytest.raises(UnavailableError):
        await ensure(residency, "a")
    vllm.start()
    assert residency.versions == ()
    await residency.drop("b")
    await ensure(residency, "a")
    assert vllm.admitted == {"a"}


async def test_an_adapter_whose_load_was_answered_to_nobody_is_taken_over(vllm, residency):
    await vllm.load("a", path=Path("/cache/a"))
    await ensure(residency, "a")
    assert vllm.loads == ["a"]
    await residency.drop("a")
    assert vllm.engine == set()


async def test_an_adapter_whose_unload_was_cut_short_is_loaded_again(vllm, residency):
    await ensure(residency, "a", "b")
    vllm.answers_get_lost = True
    with pytest.raises(UnavailableError):
        await residency.drop("a")
    vllm.answers_get_lost = False
    await ensure(residency, "a")
    assert (vllm.loads, vllm.admitted) == (["a", "b", "a"], {"a", "b"})


async def test_an_adapter_whose_admission_was_answered_to_nobody_counts_and_can_be_dropped(vllm, residency):
    vllm.answers_get_lost = True
    with pytest.raises(UnavailableError):
        await ensure(residency, "a")
    vllm.answers_get_lost = False
    assert (residency.versions, residency.serves("a")) == (("a",), False)
    await residency.drop("a")
    assert (vllm.adapters, vllm.engine, residency.versions) == ({}, set(), ())


async def test_what_vllm_holds_and_nobody_knows_of_is_unloaded(vllm, residency):
    await ensure(residency, "a")
    await vllm.load("late", path=Path("/cache/late"))
    await residency.reconcile()
    # Somebody may be about to unload it.
    assert set(vllm.adapters) == {"a", "late"}
    await residency.reconcile()
    assert (set(vllm.adapters), len(vllm.engine), residency.versions) == ({"a"}, 1, ("a",))
    assert residency.serves("a")
    # A vLLM that was started anew, with what the one before it held.
    vllm.start()
    await vllm.load("a", path=Path("/cache/a"))
    await residency.reconcile()
    await residency.reconcile()
    assert (vllm.adapters, vllm.engine) == ({}, set())


async def test_a_load_that_is_at_work_is_no_stray(vllm, residency, monkeypatch):
    load, loaded, noted = vllm.load, asyncio.Event(), asyncio.Event()

    async def load_and_answer_late(version, *, path):
        await load(version, path=path)
        loaded.set()
        await noted.wait()

    monkeypatch.setattr(vllm, "load", load_and_answer_late)
    task = asyncio.create_task(ensure(residency, "a"))
    await loaded.wait()
    dropping = [asyncio.create_task(residency.reconcile()) for _ in range(2)]
    await asyncio.sleep(0.05)
    noted.set()
    await asyncio.gather(task, *dropping)
    assert (vllm.loads, set(vllm.adapters), residency.serves("a")) == (["a"], {"a"}, True)


async def test_a_vllm_that_is_to_end_keeps_what_it_answers_from(vllm, residency):
    await ensure(residency, "a")
    vllm.ready = False
    for _ in range(2):
        await residency.reconcile()
    assert set(vllm.adapters) == {"a"}


async def test_what_vllm_no_longer_holds_is_cold_and_is_loaded_again(vllm, residency):
    await ensure(residency, "a")
    del vllm.adapters["a"]
    assert residency.serves("a")
    await residency.reconcile()
    assert (residency.versions, vllm.admitted) == ((), set())
    await ensure(residency, "a")
    assert (vllm.loads, vllm.admitted) == (["a", "a"], {"a"})


async def test_the_folder_of_a_load_that_is_at_work_may_be_read(residency, load_under_way):
    task, goes_on = load_under_way
    during = residency.paths
    goes_on.set()
    await task
    assert (during, len(during)) == (residency.paths, 2)
