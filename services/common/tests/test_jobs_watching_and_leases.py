"""Jobs while they run: watchers in this process and in others, and leases that refuse zombies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from finery_common.database import Database
from finery_common.errors import AbortedError, FailedPreconditionError, NotFoundError
from finery_common.jobs import JobState, JobStore, Lease, migrate


class _Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def move(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
async def store(database: Database, clock: _Clock) -> JobStore:
    await migrate(database)
    return JobStore(database, kind="training", id_prefix="ftjob-", now=clock)


@pytest.fixture
async def other_store(store: JobStore, database_url: str, clock: _Clock) -> AsyncIterator[JobStore]:
    """The same jobs through connections of their own, as another process has them."""
    db = await Database.open(database_url, schema="test")
    yield JobStore(db, kind="training", id_prefix="ftjob-", now=clock)
    await db.close()


async def _new(store: JobStore, request_id: str = "1") -> str:
    return (await store.create("p", request_id=request_id, spec={})).id


async def _watch(store: JobStore, job_id: str, after_sequence: int = 0) -> list[int]:
    return [event.sequence async for event in store.watch(job_id, after_sequence=after_sequence)]


@pytest.mark.parametrize("in_other_process", [False, True])
async def test_watchers_see_history_then_news_until_the_job_is_final(
    store: JobStore, other_store: JobStore, in_other_process: bool
) -> None:
    writing = other_store if in_other_process else store
    job_id = await _new(store)
    await store.transition(job_id, JobState.RUNNING)
    begun = asyncio.Event()

    async def watch() -> list[int]:
        seen: list[int] = []
        async for event in store.watch(job_id):
            seen.append(event.sequence)
            begun.set()
        return seen

    watchers = [asyncio.create_task(watch()) for _ in range(3)]
    await begun.wait()
    for _ in range(20):
        await writing.append_event(job_id, type="step")
    await writing.transition(job_id, JobState.SUCCEEDED)
    assert await asyncio.gather(*watchers) == [list(range(1, 24))] * 3


async def test_a_write_in_this_process_wakes_the_watcher_without_polling(database: Database) -> None:
    await migrate(database)
    store = JobStore(database, kind="training", id_prefix="ftjob-", poll_interval_s=3600)
    job_id = await _new(store)
    watch = store.watch(job_id, after_sequence=1)
    news = asyncio.ensure_future(anext(watch))
    await asyncio.wait([news], timeout=0.1)
    await store.append_event(job_id, type="step")
    async with asyncio.timeout(10):
        assert (await news).sequence == 2
    await watch.aclose()


async def test_a_watcher_goes_on_from_the_last_sequence_it_saw(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finery_common.jobs.store._WATCH_BATCH", 5)
    job_id = await _new(store)
    for _ in range(12):
        await store.append_event(job_id, type="step")
    await store.transition(job_id, JobState.CANCELLED)
    assert await _watch(store, job_id, 1) == list(range(2, 15))
    assert await _watch(store, job_id, 14) == []


async def test_a_watcher_may_wait_for_more_than_the_final_state(store: JobStore) -> None:
    job_id = await _new(store)
    await store.transition(job_id, JobState.RUNNING)
    await store.transition(job_id, JobState.SUCCEEDED, result={"deployment": "PENDING"})
    watch = store.watch(job_id, until=lambda job: job.state.is_final and job.result["deployment"] != "PENDING")
    for expected in (1, 2, 3):
        assert (await anext(watch)).sequence == expected
    await store.append_event(job_id, type="deployment", result={"deployment": "READY"})
    assert [event.type async for event in watch] == ["deployment"]


async def test_a_watcher_that_leaves_early_leaves_nothing_behind(store: JobStore) -> None:
    job_id = await _new(store)
    watch = store.watch(job_id)
    await anext(watch)
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.wait([waiting], timeout=0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert store._watchers == {}


async def test_watching_an_unknown_job_says_so(store: JobStore) -> None:
    with pytest.raises(NotFoundError):
        await anext(store.watch("ftjob-none"))


async def test_a_lease_is_given_once(store: JobStore, other_store: JobStore, clock: _Clock) -> None:
    job_id = await _new(store)
    stores = (store, other_store) * 5
    outcomes = await asyncio.gather(*(s.acquire(job_id, holder=f"w{i}", ttl_s=30) for i, s in enumerate(stores)), return_exceptions=True)
    assert [outcome for outcome in outcomes if isinstance(outcome, Lease)] == [Lease(job_id, 1)]
    assert {type(outcome) for outcome in outcomes} == {Lease, AbortedError}
    assert (await store.get("p", job_id)).lease_expires_at == clock() + timedelta(seconds=30)


async def test_a_refused_lease_says_who_holds_it(store: JobStore) -> None:
    job_id = await _new(store)
    await store.acquire(job_id, holder="worker-7", ttl_s=30)
    with pytest.raises(AbortedError, match="held by worker-7, epoch 1, until 2026-01-01T00:00:30"):
        await store.acquire(job_id, holder="worker-8", ttl_s=30)


async def test_a_zombie_can_neither_report_nor_renew_nor_finish(store: JobStore, clock: _Clock) -> None:
    job_id = await _new(store)
    zombie = await store.acquire(job_id, holder="old", ttl_s=30)
    await store.transition(job_id, JobState.RUNNING, epoch=zombie.epoch)
    clock.move(30)
    lease = await store.acquire(job_id, holder="new", ttl_s=30)
    before = await store.get("p", job_id)
    calls = [
        store.append_event(job_id, type="step", epoch=zombie.epoch),
        store.transition(job_id, JobState.SUCCEEDED, epoch=zombie.epoch),
        store.renew(zombie, ttl_s=30),
        store.append_event(job_id, type="step", epoch=3),
    ]
    for call in calls:
        with pytest.raises(AbortedError, match=r"Epoch \d does not hold .*: epoch 2 holds it now"):
            await call
    await store.release(zombie)
    assert await store.get("p", job_id) == before
    assert (await store.transition(job_id, JobState.SUCCEEDED, epoch=lease.epoch)).state == JobState.SUCCEEDED


async def test_a_finished_attempt_cannot_write_any_more(store: JobStore) -> None:
    job_id = await _new(store)
    lease = await store.acquire(job_id, holder="w", ttl_s=30)
    await store.transition(job_id, JobState.RUNNING, epoch=lease.epoch)
    await store.transition(job_id, JobState.CANCELLED)
    with pytest.raises(AbortedError, match="nobody holds it now, and epoch 1 was the last"):
        await store.append_event(job_id, type="step", epoch=lease.epoch)
    await store.release(lease)
    await store.append_event(job_id, type="deployment")


async def test_a_renewed_lease_lives_on_and_says_what_is_wanted(store: JobStore, clock: _Clock) -> None:
    job_id = await _new(store)
    lease = await store.acquire(job_id, holder="w", ttl_s=30)
    await store.transition(job_id, JobState.RUNNING, epoch=lease.epoch)
    clock.move(20)
    await store.request(job_id, "cancel")
    job = await store.renew(lease, ttl_s=30)
    assert (job.wanted, job.lease_expires_at) == ("cancel", clock() + timedelta(seconds=30))
    clock.move(20)
    assert await store.expired_leases() == ()
    clock.move(10)
    assert [job.id for job in await store.expired_leases()] == [job_id]
    # Late, but nobody took it.
    await store.renew(lease, ttl_s=30)
    assert await store.expired_leases() == ()


async def test_only_jobs_somebody_should_work_on_have_expired_leases(store: JobStore, clock: _Clock) -> None:
    ids = {}
    for state in (JobState.QUEUED, JobState.VALIDATING, JobState.RUNNING, JobState.PAUSED, JobState.CANCELLED):
        ids[state] = await _new(store, state)
        await store.acquire(ids[state], holder="w", ttl_s=30)
        if state != JobState.QUEUED:
            await store.transition(ids[state], state)
    assert await store.expired_leases() == ()
    clock.move(31)
    assert [job.id for job in await store.expired_leases()] == [ids[JobState.VALIDATING], ids[JobState.RUNNING]]


async def test_a_released_running_job_is_taken_up_at_once(store: JobStore) -> None:
    job_id = await _new(store)
    lease = await store.acquire(job_id, holder="w", ttl_s=30)
    await store.transition(job_id, JobState.RUNNING, epoch=lease.epoch)
    await store.release(lease)
    assert [job.id for job in await store.expired_leases()] == [job_id]
    assert await store.acquire(job_id, holder="next", ttl_s=30) == Lease(job_id, 2)


@pytest.mark.parametrize("state", [JobState.PAUSED, JobState.CANCELLED])
async def test_a_job_nobody_should_work_on_gives_no_lease(store: JobStore, state: JobState) -> None:
    job_id = await _new(store)
    await store.transition(job_id, state)
    with pytest.raises(FailedPreconditionError, match=f"is {state}; only a QUEUED"):
        await store.acquire(job_id, holder="w", ttl_s=30)


async def test_the_queue_is_first_in_first_out_and_leaves_out_what_is_held(store: JobStore, clock: _Clock) -> None:
    ids = [await _new(store, str(number)) for number in range(5)]
    await store.transition(ids[0], JobState.PAUSED)
    await store.transition(ids[1], JobState.RUNNING)
    await store.acquire(ids[2], holder="w", ttl_s=30)
    assert [job.id for job in await store.runnable(limit=10)] == ids[3:]
    await store.transition(ids[0], JobState.QUEUED)
    clock.move(30)
    assert [job.id for job in await store.runnable(limit=3)] == [ids[0], ids[2], ids[3]]
