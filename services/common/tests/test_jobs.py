"""Jobs: creation, states, events, listing and deletion, on every kind of database."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st

from finery_common.database import Database
from finery_common.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from finery_common.jobs import TRANSITIONS, EventLevel, JobState, JobStore, Wanted, migrate
from finery_common.jobs.model import canonical_json, check_transition
from finery_common.jobs.tables import Base

_START = datetime(2026, 1, 31, 23, 59, 59, 123456, tzinfo=UTC)
_TO_STATE = {
    JobState.QUEUED: (),
    JobState.VALIDATING: (JobState.VALIDATING,),
    JobState.RUNNING: (JobState.RUNNING,),
    JobState.PAUSED: (JobState.PAUSED,),
    JobState.SUCCEEDED: (JobState.RUNNING, JobState.SUCCEEDED),
    JobState.FAILED: (JobState.FAILED,),
    JobState.CANCELLED: (JobState.CANCELLED,),
}


@pytest.fixture
async def store(database: Database) -> JobStore:
    """An empty store whose clock stands at `_START`."""
    await migrate(database)
    return JobStore(database, kind="training", id_prefix="ftjob-", now=lambda: _START)


async def _job_in(store: JobStore, state: JobState, *, request_id: str = "1") -> str:
    job = await store.create("p", request_id=request_id, spec={})
    for step in _TO_STATE[state]:
        await store.transition(job.id, step)
    return job.id


async def test_the_migrations_make_the_tables_the_code_expects(database: Database) -> None:
    await migrate(database)
    async with database.read() as session:
        connection = await session.connection()

        def differences(sync_connection):
            return compare_metadata(MigrationContext.configure(sync_connection, opts={"version_table": "jobs_version"}), Base.metadata)

        assert await connection.run_sync(differences) == []


async def test_a_new_job_is_queued_and_reads_back_exactly(store: JobStore) -> None:
    spec: dict[str, object] = {
        "optimizer": {"learning_rate": 2e-4, "huge": 1e300, "tiny": 5e-324, "whole": 1.0},
        "text": 'é𝕏 "quoted" \\u0000',
        "none": None,
        "z": [1, True],
    }
    job = await store.create("p", request_id="1", spec=spec, metadata={"team": "a"})
    assert job == await store.get("p", job.id)
    assert list(job.spec.items()) == list(spec.items())
    assert "'whole': 1.0" in str(job.spec)
    assert job.id.startswith("ftjob-")
    assert len(job.id) == len("ftjob-") + 24
    assert (job.state, job.wanted, job.epoch, job.last_sequence, job.metadata) == (JobState.QUEUED, Wanted.NONE, 0, 1, {"team": "a"})
    assert job.created_at == _START
    assert job.created_at.tzinfo is UTC
    assert job.started_at is job.finished_at is job.lease_expires_at is job.error is None


async def test_the_same_request_gives_the_same_job(store: JobStore) -> None:
    first = await store.create("p", request_id="1", spec={"a": 1, "b": 2.0}, metadata={"k": "v"})
    assert await store.create("p", request_id="1", spec={"b": 2.0, "a": 1}, metadata={"k": "v"}) == first
    assert len((await store.list("p")).jobs) == 1
    assert len(await store.events(first.id)) == 1


async def test_a_request_id_is_known_to_its_own_project_once_it_made_a_job(store: JobStore) -> None:
    assert not await store.knows("p", request_id="1")
    await store.create("p", request_id="1", spec={})
    assert await store.knows("p", request_id="1")
    assert not await store.knows("q", request_id="1")


@pytest.mark.parametrize(("spec", "metadata"), [({"a": 2}, {}), ({"a": 1}, {"k": "v"}), ({}, {})])
async def test_the_same_request_id_with_another_body_is_refused(store: JobStore, spec: dict[str, object], metadata: dict[str, str]) -> None:
    first = await store.create("p", request_id="1", spec={"a": 1})
    with pytest.raises(AlreadyExistsError, match=f"made job {first.id} from another body"):
        await store.create("p", request_id="1", spec=spec, metadata=metadata)


async def test_request_ids_of_projects_and_kinds_do_not_meet(store: JobStore, database: Database) -> None:
    conversions = JobStore(database, kind="conversion", id_prefix="conv-")
    ids = [
        (await store.create("p", request_id="1", spec={})).id,
        (await store.create("q", request_id="1", spec={})).id,
        (await conversions.create("p", request_id="1", spec={})).id,
    ]
    assert len(set(ids)) == 3
    with pytest.raises(NotFoundError):
        await store.get("p", ids[2])


async def test_creating_the_same_job_many_times_at_once_makes_one(store: JobStore, database: Database, database_url: str) -> None:
    other = await Database.open(database_url, schema="test")
    stores = (store, JobStore(other, kind="training", id_prefix="ftjob-"))
    jobs = await asyncio.gather(*(a_store.create("p", request_id="1", spec={"a": 1}) for a_store in stores * 10))
    await other.close()
    assert len({job.id for job in jobs}) == 1
    assert len((await store.list("p")).jobs) == 1
    assert [event.sequence for event in await store.events(jobs[0].id)] == [1]


@pytest.mark.parametrize("request_id", ["", "x" * 129])
async def test_a_request_id_of_no_use_is_refused(store: JobStore, request_id: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"request_id of {len(request_id)} characters; want 1 to 128"):
        await store.create("p", request_id=request_id, spec={})


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"a": float("nan")}, "finite"),
        ({"a": float("inf")}, "finite"),
        ({"a": object()}, "JSON"),
        ({"a": "\ud800"}, "Unicode"),
        ({"a": "\0"}, r"U\+0000"),
    ],
)
async def test_values_that_json_or_the_database_cannot_hold_are_refused(store: JobStore, spec: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        await store.create("p", request_id="1", spec=spec)
    assert (await store.list("p")).jobs == ()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        lambda x: st.dictionaries(st.text("ab"), x),
    )
)
def test_canonical_json_does_not_depend_on_order(value: object) -> None:
    backwards = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert canonical_json(backwards, what="it") == canonical_json(value, what="it")


async def test_another_projects_job_is_as_unknown_as_a_missing_one(store: JobStore) -> None:
    job = await store.create("p", request_id="1", spec={})
    with pytest.raises(NotFoundError) as foreign:
        await store.get("q", job.id)
    missing_id = "ftjob-" + "0" * 24
    with pytest.raises(NotFoundError) as missing:
        await store.get("q", missing_id)
    assert foreign.value.message.replace(job.id, missing_id) == missing.value.message


@pytest.mark.parametrize(("from_state", "to"), list(itertools.product(JobState, JobState)))
def test_only_the_transitions_of_the_table_are_allowed(from_state: JobState, to: JobState) -> None:
    if to in TRANSITIONS[from_state]:
        check_transition("j", from_state, to)
    else:
        with pytest.raises(FailedPreconditionError, match=f"is {from_state} and cannot become {to}"):
            check_transition("j", from_state, to)


def test_final_states_have_no_way_out_and_every_other_state_reaches_one() -> None:
    assert {state for state in JobState if state.is_final} == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    for state in JobState:
        assert state.is_final or {JobState.FAILED, JobState.CANCELLED} <= TRANSITIONS[state]
    assert all(JobState.SUCCEEDED not in TRANSITIONS[state] for state in JobState if state != JobState.RUNNING)


@pytest.mark.parametrize("final", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
async def test_an_illegal_transition_changes_nothing(store: JobStore, final: JobState) -> None:
    job_id = await _job_in(store, final)
    before = await store.get("p", job_id)
    with pytest.raises(FailedPreconditionError, match=f"is {final} and cannot become RUNNING; from there it may become nothing"):
        await store.transition(job_id, JobState.RUNNING, result={"a": 1})
    assert await store.get("p", job_id) == before


async def test_a_jobs_life_is_written_in_its_events(database: Database) -> None:
    await migrate(database)
    clock = itertools.count()
    store = JobStore(database, kind="training", id_prefix="ftjob-", now=lambda: _START + timedelta(seconds=next(clock)))
    job = await store.create("p", request_id="1", spec={})
    await store.transition(job.id, JobState.VALIDATING)
    await store.transition(job.id, JobState.RUNNING, message="Training starts.", data={"attempt": 1}, progress={"step": 0, "num_steps": 9})
    await store.append_event(job.id, type="step", data={"loss": 1.5}, progress={"step": 1})
    running = await store.append_event(job.id, type="checkpoint", level=EventLevel.WARN, message="Slow disk.", result={"adapter": "a"})
    done = await store.transition(job.id, JobState.FAILED, error={"code": "broken"}, result={"csv": "c"})

    events = await store.events(job.id)
    assert [(event.type, event.state, event.level) for event in events] == [
        ("state", JobState.QUEUED, EventLevel.INFO),
        ("state", JobState.VALIDATING, EventLevel.INFO),
        ("state", JobState.RUNNING, EventLevel.INFO),
        ("step", JobState.RUNNING, EventLevel.INFO),
        ("checkpoint", JobState.RUNNING, EventLevel.WARN),
        ("state", JobState.FAILED, EventLevel.ERROR),
    ]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
    assert (events[2].message, events[2].data, events[3].data) == ("Training starts.", {"attempt": 1}, {"loss": 1.5})
    assert sorted(event.created_at for event in events) == [event.created_at for event in events]
    assert running.progress == {"step": 1, "num_steps": 9}
    assert (done.result, done.error) == ({"adapter": "a", "csv": "c"}, {"code": "broken"})
    assert done.created_at <= events[0].created_at
    assert (running.started_at, done.finished_at) == (events[2].created_at, events[5].created_at)
    assert done == await store.get("p", job.id)


async def test_events_are_read_by_range_order_and_type(store: JobStore) -> None:
    job = await store.create("p", request_id="1", spec={})
    for number in range(2, 9):
        await store.append_event(job.id, type="step" if number % 2 else "checkpoint")

    async def sequences(**query) -> list[int]:
        return [event.sequence for event in await store.events(job.id, **query)]

    assert await sequences(after_sequence=5) == [6, 7, 8]
    assert await sequences(descending=True, limit=3) == [8, 7, 6]
    assert await sequences(descending=True, limit=3, before_sequence=6) == [5, 4, 3]
    assert await sequences(type="checkpoint") == [2, 4, 6, 8]
    assert await sequences(type="step", after_sequence=3) == [5, 7]
    with pytest.raises(NotFoundError):
        await store.events("ftjob-none")


async def test_events_of_twenty_writers_have_no_gaps(store: JobStore, database_url: str) -> None:
    other = await Database.open(database_url, schema="test")
    stores = (store, JobStore(other, kind="training", id_prefix="ftjob-"))
    job = await store.create("p", request_id="1", spec={})

    async def write(writer: int) -> None:
        for number in range(5):
            await stores[writer % 2].append_event(job.id, type="step", data={"writer": writer, "number": number})

    await asyncio.gather(*(write(writer) for writer in range(20)))
    await other.close()
    events = await store.events(job.id, limit=1000)
    assert [event.sequence for event in events] == list(range(1, 102))
    assert (await store.get("p", job.id)).last_sequence == 101
    for writer in range(20):
        assert [event.data["number"] for event in events if event.data.get("writer") == writer] == [0, 1, 2, 3, 4]


async def test_pages_are_newest_first_and_stay_put_while_jobs_come_and_go(store: JobStore) -> None:
    ids = [await _job_in(store, JobState.CANCELLED, request_id=str(number)) for number in range(7)]
    await store.create("another", request_id="0", spec={})
    first = await store.list("p", page_size=3)
    assert [job.id for job in first.jobs] == ids[:3:-1]
    await store.create("p", request_id="new", spec={})
    await store.delete(ids[4])
    await store.delete(ids[2])
    second = await store.list("p", page_size=3, page_token=first.next_page_token)
    assert [job.id for job in second.jobs] == [ids[3], ids[1], ids[0]]
    assert second.next_page_token == ""


@pytest.mark.parametrize("token", ["nonsense", "ftjob-" + "0" * 24, "'; --"])
async def test_a_page_token_nobody_gave_is_refused(store: JobStore, token: str) -> None:
    await store.create("p", request_id="1", spec={})
    with pytest.raises(InvalidArgumentError, match="page token"):
        await store.list("p", page_token=token)


async def test_another_projects_page_token_is_refused(store: JobStore) -> None:
    foreign = await store.create("q", request_id="1", spec={})
    with pytest.raises(InvalidArgumentError, match="page token"):
        await store.list("p", page_token=foreign.id)


async def test_text_that_postgresql_cannot_hold_is_the_callers_error(store: JobStore) -> None:
    for call in (store.get("p", "\0"), store.list("p", page_token="\0")):
        with pytest.raises((NotFoundError, InvalidArgumentError)):
            await call


async def test_a_negative_page_size_is_refused(store: JobStore) -> None:
    with pytest.raises(InvalidArgumentError, match="page_size -1"):
        await store.list("p", page_size=-1)


async def test_jobs_are_filtered_by_every_metadata_pair(store: JobStore) -> None:
    odd = "a\"b.c[0]$ é'"
    ids = [
        (await store.create("p", request_id=str(number), spec={}, metadata=metadata)).id
        for number, metadata in enumerate([{"team": "a", odd: odd}, {"team": "a"}, {"team": "1"}, {}])
    ]

    async def found(metadata: dict[str, str]) -> list[str]:
        return [job.id for job in (await store.list("p", metadata=metadata)).jobs]

    assert await found({"team": "a"}) == [ids[1], ids[0]]
    assert await found({"team": "a", odd: odd}) == [ids[0]]
    assert await found({"team": "1"}) == [ids[2]]
    assert await found({"te": "a"}) == await found({"team": "A"}) == []


async def test_a_deleted_job_is_gone_but_its_ids_are_never_used_again(store: JobStore) -> None:
    job_id = await _job_in(store, JobState.SUCCEEDED)
    await store.delete(job_id)
    for call in (store.get("p", job_id), store.events(job_id), store.delete(job_id), store.append_event(job_id, type="message")):
        with pytest.raises(NotFoundError):
            await call
    assert (await store.list("p")).jobs == ()
    assert (await store.states_count())[JobState.SUCCEEDED] == 0
    with pytest.raises(AlreadyExistsError, match="a job that was deleted; use a new request id"):
        await store.create("p", request_id="1", spec={})


@pytest.mark.parametrize("state", [state for state in JobState if not state.is_final])
async def test_only_a_final_job_can_be_deleted(store: JobStore, state: JobState) -> None:
    job_id = await _job_in(store, state)
    with pytest.raises(FailedPreconditionError, match=f"is {state}; cancel it"):
        await store.delete(job_id)
    assert (await store.get("p", job_id)).state == state


async def test_a_request_is_noted_once_and_ends_with_what_it_wanted(store: JobStore) -> None:
    job_id = await _job_in(store, JobState.RUNNING)
    assert (await store.request(job_id, "pause")).wanted == Wanted.PAUSE
    await store.request(job_id, "pause")
    assert [event.data for event in await store.events(job_id, type="message")] == [{"wanted": "pause"}]
    assert (await store.request(job_id, None)).wanted == Wanted.NONE
    await store.request(job_id, Wanted.PAUSE)
    assert (await store.transition(job_id, JobState.PAUSED)).wanted == Wanted.NONE
    await store.transition(job_id, JobState.QUEUED)
    await store.request(job_id, "cancel")
    assert (await store.transition(job_id, JobState.CANCELLED)).wanted == Wanted.NONE


async def test_a_cancellation_outlives_a_pause_and_cannot_be_taken_back(store: JobStore) -> None:
    job_id = await _job_in(store, JobState.RUNNING)
    await store.request(job_id, "pause")
    await store.request(job_id, "cancel")
    for wanted in ("pause", None):
        with pytest.raises(FailedPreconditionError, match="cannot be taken back"):
            await store.request(job_id, wanted)
    assert (await store.transition(job_id, JobState.PAUSED)).wanted == Wanted.CANCEL


async def test_nothing_can_be_asked_of_a_final_job(store: JobStore) -> None:
    job_id = await _job_in(store, JobState.FAILED)
    with pytest.raises(FailedPreconditionError, match="is FAILED, which is final"):
        await store.request(job_id, "cancel")


async def test_states_are_counted_with_their_zeros(store: JobStore) -> None:
    for number, state in enumerate([JobState.QUEUED, JobState.QUEUED, JobState.RUNNING]):
        await _job_in(store, state, request_id=str(number))
    expected = dict.fromkeys(JobState, 0) | {JobState.QUEUED: 2, JobState.RUNNING: 1}
    assert await store.states_count() == expected


async def test_jobs_survive_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    first = await Database.open(url, schema="test")
    await migrate(first)
    store = JobStore(first, kind="training", id_prefix="ftjob-")
    job = await store.create("p", request_id="1", spec={"a": 1})
    await store.transition(job.id, JobState.RUNNING)
    await first.close()

    second = await Database.open(url, schema="test")
    await migrate(second)
    store = JobStore(second, kind="training", id_prefix="ftjob-")
    await store.append_event(job.id, type="step")
    await store.transition(job.id, JobState.SUCCEEDED)
    seen = [event.sequence async for event in store.watch(job.id, after_sequence=1)]
    assert seen == [2, 3, 4]
    assert (await store.create("p", request_id="1", spec={"a": 1})).state == JobState.SUCCEEDED
    await second.close()


async def test_jobs_are_found_by_state_and_result_over_all_projects(store: JobStore) -> None:
    first = await store.create("alpha", request_id="1", spec={})
    second = await store.create("beta", request_id="1", spec={})
    await store.create("beta", request_id="2", spec={})
    for job, deployment in ((first, "PENDING"), (second, "READY")):
        await store.transition(job.id, JobState.RUNNING)
        await store.transition(job.id, JobState.SUCCEEDED, result={"deployment_state": deployment})
    assert [job.id for job in await store.find(JobState.SUCCEEDED)] == [first.id, second.id]
    assert [job.id for job in await store.find(JobState.SUCCEEDED, result={"deployment_state": "PENDING"})] == [first.id]
    assert not await store.find(JobState.QUEUED, result={"deployment_state": "PENDING"})
