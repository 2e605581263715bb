"""Jobs in the database: every change is one transaction that also writes its event, and a stale epoch changes nothing.

Owns order (gapless sequences, first in first out), idempotent creation, leases and watching. Leaves policy to the service: when an
attempt is started, how long a lease runs, what follows a lost one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from finery_common.database import Database
from finery_common.errors import AbortedError, AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from finery_common.jobs.model import EventLevel, Job, JobEvent, JobPage, JobState, Lease, Wanted, canonical_json, check_transition
from finery_common.jobs.tables import JobEventRow, JobRow, event_of, job_of

_MAX_PAGE_SIZE = 1000
_MAX_REQUEST_ID_LENGTH = 128
_WATCH_BATCH = 500

_REQUEST_TEXT = {
    Wanted.NONE: "The pause was taken back.",
    Wanted.PAUSE: "A pause was asked for.",
    Wanted.CANCEL: "Cancellation was asked for.",
}

JsonObject = Mapping[str, object]


async def migrate(db: Database) -> None:
    """Brings the tables `jobs` and `job_events` of `db` to their newest revision."""
    await db.migrate("finery_common.jobs.migrations", version_table="jobs_version")


def _utc_now() -> datetime:
    return datetime.now(UTC)


class JobStore:
    """The jobs of one kind. Every method that names a job raises NotFoundError where there is none of this kind."""

    def __init__(
        self, db: Database, *, kind: str, id_prefix: str, now: Callable[[], datetime] = _utc_now, poll_interval_s: float = 0.25
    ) -> None:
        self._db = db
        self._kind = kind
        self._id_prefix = id_prefix
        self._now = now
        self._poll_interval_s = poll_interval_s
        self._watchers: dict[str, set[asyncio.Event]] = {}

    async def create(
        self,
        project: str,
        *,
        request_id: str,
        spec: JsonObject,
        metadata: Mapping[str, str] | None = None,
        progress: JsonObject | None = None,
    ) -> Job:
        """Commits a QUEUED job before it returns, with `progress` as what is known of its work so far.

        The same `request_id` in the same project gives the job that exists if spec and metadata are equal, as often as it is asked.
        Raises AlreadyExistsError if they differ or that job was deleted, InvalidArgumentError for a bad request id and values JSON lacks.
        """
        if not 1 <= len(request_id) <= _MAX_REQUEST_ID_LENGTH:
            raise InvalidArgumentError(
                f"Got a request_id of {len(request_id)} characters; want 1 to {_MAX_REQUEST_ID_LENGTH}, a fresh UUID for example.",
                param="request_id",
            )
        labels = dict(metadata or {})
        spec_json = canonical_json(spec, what="spec")
        body = f'{{"metadata":{canonical_json(labels, what="metadata")},"spec":{spec_json}}}'
        body_sha256 = hashlib.sha256(body.encode()).hexdigest()
        job_id = f"{self._id_prefix}{secrets.token_hex(12)}"
        async with self._db.begin() as session:
            if await self._insert(session, job_id, project, request_id, body_sha256, dict(spec), labels, dict(progress or {})):
                row = await self._row(session, job_id)
                self._record(session, row, "state", EventLevel.INFO, "The job was created and waits for its turn.", {})
                await session.flush()
            else:
                row = await self._repeated(session, project, request_id, body_sha256)
            return job_of(row)

    async def knows(self, project: str, *, request_id: str) -> bool:
        """Whether `create` made a job for this request id, so that repeating it needs no checks: the answer is that job, or a refusal."""
        async with self._db.read() as session:
            query = sa.select(JobRow.id).where(JobRow.kind == self._kind, JobRow.project == project, JobRow.request_id == request_id)
            return await session.scalar(query) is not None

    async def get(self, project: str, job_id: str) -> Job:
        """The job as it is now. Another project's is as unknown as one that never was: NotFoundError with the same text."""
        async with self._db.read() as session:
            row = await session.scalar(self._select().where(JobRow.id == job_id, JobRow.project == project))
        if row is None:
            raise _not_found(job_id)
        return job_of(row)

    async def list(self, project: str, *, page_size: int = 20, page_token: str = "", metadata: Mapping[str, str] | None = None) -> JobPage:
        """The project's jobs, newest first, whose metadata has every pair of `metadata`.

        `page_size` of 0 means 20; more than 1,000 gives 1,000. `page_token` is the id of the job before the page, as `next_page_token`
        gives it: it stays good while jobs come and go. Raises InvalidArgumentError for a token or size that cannot be.
        """
        if page_size < 0:
            raise InvalidArgumentError(f"Got page_size {page_size}; want 0 to {_MAX_PAGE_SIZE}.", param="page_size")
        size = min(page_size or 20, _MAX_PAGE_SIZE)
        async with self._db.read() as session:
            query = self._select().where(JobRow.project == project).order_by(JobRow.number.desc()).limit(size + 1)
            if page_token:
                query = query.where(JobRow.number < await self._number_of(session, project, page_token))
            for key, value in (metadata or {}).items():
                query = query.where(self._has_label(key, value))
            rows = (await session.scalars(query)).all()
        jobs = tuple(job_of(row) for row in rows[:size])
        return JobPage(jobs=jobs, next_page_token=jobs[-1].id if len(rows) > size else "")

    async def transition(
        self,
        job_id: str,
        to: JobState,
        *,
        message: str = "",
        epoch: int | None = None,
        data: JsonObject | None = None,
        result: JsonObject | None = None,
        error: JsonObject | None = None,
        progress: JsonObject | None = None,
    ) -> Job:
        """Moves the job to state `to` and writes a `state` event.

        `result` and `progress` are merged into what is there, key by key; `error` replaces. A job that is no longer VALIDATING or
        RUNNING gives up its lease; a final one forgets what was wanted of it, a PAUSED one that a pause was. Raises
        FailedPreconditionError, naming both states, for a step that is not in `TRANSITIONS`, and AbortedError for a stale `epoch`.
        """
        async with self._change(job_id, epoch=epoch) as (session, row):
            from_state = JobState(row.state)
            check_transition(job_id, from_state, to)
            row.state = to.value
            _merge(row, result=result, progress=progress)
            if error is not None:
                row.error = _stored(error, "error")
            level = EventLevel.ERROR if to == JobState.FAILED else EventLevel.INFO
            self._record(session, row, "state", level, message or f"The job went from {from_state} to {to}.", data or {})
            _enter(row, to)
            return job_of(row)

    async def append_event(
        self,
        job_id: str,
        *,
        type: str,  # noqa: A002 - the event's own word on the wire
        message: str = "",
        level: EventLevel = EventLevel.INFO,
        data: JsonObject | None = None,
        epoch: int | None = None,
        result: JsonObject | None = None,
        progress: JsonObject | None = None,
    ) -> Job:
        """Writes an event without changing the state; final jobs take events too (their deployment, for instance).

        `result` and `progress` are merged into what is there, key by key. Raises AbortedError for a stale `epoch` and
        InvalidArgumentError for values JSON lacks, NaN among them.
        """
        async with self._change(job_id, epoch=epoch) as (session, row):
            _merge(row, result=result, progress=progress)
            self._record(session, row, type, level, message, data or {})
            return job_of(row)

    async def request(self, job_id: str, wanted: Wanted | Literal["pause", "cancel"] | None) -> Job:
        """Notes what is wanted of the job, for whoever works on it, and writes a `message` event; asking twice writes one.

        None takes a pause back. Raises FailedPreconditionError on a final job and where a cancellation is already wanted.
        """
        new = Wanted(wanted or Wanted.NONE)
        async with self._change(job_id) as (session, row):
            if JobState(row.state).is_final:
                raise FailedPreconditionError(f"Job {job_id} is {row.state}, which is final; there is nothing left to {new}.")
            if row.wanted == Wanted.CANCEL and new != Wanted.CANCEL:
                raise FailedPreconditionError(f"Job {job_id} is being cancelled; that cannot be taken back. Create a new job instead.")
            if row.wanted != new:
                row.wanted = new.value
                self._record(session, row, "message", EventLevel.INFO, _REQUEST_TEXT[new], {"wanted": new.value})
            return job_of(row)

    async def delete(self, job_id: str) -> None:
        """Hides a final job for good. Its row stays, so neither its id nor its request id is used again.

        Raises FailedPreconditionError for a job that is not final.
        """
        async with self._change(job_id) as (_session, row):
            if not JobState(row.state).is_final:
                raise FailedPreconditionError(f"Job {job_id} is {row.state}; cancel it and wait until it is CANCELLED before deleting it.")
            row.deleted_at = self._now()

    async def events(
        self,
        job_id: str,
        *,
        after_sequence: int = 0,
        before_sequence: int | None = None,
        limit: int = 100,
        descending: bool = False,
        type: str | None = None,  # noqa: A002 - the event's own word on the wire
    ) -> tuple[JobEvent, ...]:
        """The job's events with `after_sequence` < sequence < `before_sequence`, at most `limit` (and 1,000), of one `type` if given."""
        async with self._db.read() as session:
            row = await self._row(session, job_id)
            query = sa.select(JobEventRow).where(JobEventRow.job_number == row.number, JobEventRow.sequence > after_sequence)
            if before_sequence is not None:
                query = query.where(JobEventRow.sequence < before_sequence)
            if type is not None:
                query = query.where(JobEventRow.type == type)
            order = JobEventRow.sequence.desc() if descending else JobEventRow.sequence
            rows = await session.scalars(query.order_by(order).limit(min(limit, _MAX_PAGE_SIZE)))
            return tuple(event_of(row) for row in rows)

    async def watch(
        self, job_id: str, *, after_sequence: int = 0, until: Callable[[Job], bool] | None = None
    ) -> AsyncGenerator[JobEvent, None]:
        """Every event after `after_sequence`, then each new one, no matter which process writes it.

        Ends after the newest event once `until` holds for the job: by default once it is final. A watcher that comes back with the
        last sequence it saw misses nothing and sees nothing twice. Raises UnavailableError when the database goes away and
        NotFoundError when the job is deleted. One who leaves early closes it (`contextlib.aclosing`).
        """
        changed = asyncio.Event()
        self._watchers.setdefault(job_id, set()).add(changed)
        try:
            while True:
                changed.clear()
                job, news = await self._news(job_id, after_sequence)
                for event in news:
                    yield event
                    after_sequence = event.sequence
                if after_sequence < job.last_sequence:
                    continue
                if until(job) if until else job.state.is_final:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_interval_s):
                        await changed.wait()
        finally:
            self._watchers[job_id].discard(changed)
            if not self._watchers[job_id]:
                del self._watchers[job_id]

    async def acquire(self, job_id: str, *, holder: str, ttl_s: float) -> Lease:
        """Gives `holder` the job for `ttl_s` seconds under a new epoch; every older epoch is refused from then on.

        Raises AbortedError while another lease is live, FailedPreconditionError for a job that is PAUSED or final.
        """
        async with self._change(job_id) as (_session, row):
            if row.state != JobState.QUEUED and not JobState(row.state).is_active:
                raise FailedPreconditionError(f"Job {job_id} is {row.state}; only a QUEUED, VALIDATING or RUNNING job can be worked on.")
            if row.lease_expires_at is not None and row.lease_expires_at > self._now():
                raise AbortedError(
                    f"Job {job_id} is held by {row.lease_holder}, epoch {row.epoch}, until {row.lease_expires_at.isoformat()}; wait for it."
                )
            row.epoch += 1
            row.lease_holder = holder
            row.lease_expires_at = self._now() + timedelta(seconds=ttl_s)
            return Lease(job_id=job_id, epoch=row.epoch)

    async def renew(self, lease: Lease, *, ttl_s: float) -> Job:
        """Prolongs the lease to `ttl_s` seconds from now, even a lapsed one nobody took; the job returned says what is wanted.

        Raises AbortedError if a newer epoch holds the job or this one was given up.
        """
        async with self._change(lease.job_id, epoch=lease.epoch) as (_session, row):
            row.lease_expires_at = self._now() + timedelta(seconds=ttl_s)
            return job_of(row)

    async def release(self, lease: Lease) -> None:
        """Gives the lease up; nothing happens if it is no longer held, so that a clean-up may always call it."""
        async with self._change(lease.job_id) as (_session, row):
            if row.epoch == lease.epoch:
                _drop_lease(row)

    async def expired_leases(self, *, limit: int = 100) -> tuple[Job, ...]:
        """VALIDATING and RUNNING jobs that nobody holds: their lease ran out or was released. Oldest first."""
        states = [state.value for state in JobState if state.is_active]
        return await self._fetch(self._select().where(JobRow.state.in_(states), self._unheld()).order_by(JobRow.number).limit(limit))

    async def runnable(self, *, limit: int = 10) -> tuple[Job, ...]:
        """QUEUED jobs that nobody holds, in the order in which they were created, those with something `wanted` included."""
        query = self._select().where(JobRow.state == JobState.QUEUED.value, self._unheld())
        return await self._fetch(query.order_by(JobRow.number).limit(limit))

    async def find(self, *states: JobState, result: Mapping[str, str] | None = None, limit: int = 1000) -> tuple[Job, ...]:
        """Jobs of every project that are in one of `states` and whose result has every pair of `result`. Oldest first."""
        query = self._select().where(JobRow.state.in_([state.value for state in states]))
        for key, value in (result or {}).items():
            query = query.where(JobRow.result[key].as_string() == value)
        return await self._fetch(query.order_by(JobRow.number).limit(limit))

    async def states_count(self) -> dict[JobState, int]:
        """How many jobs are in each state, over all projects; states without a job are there with 0."""
        query = sa.select(JobRow.state, sa.func.count()).group_by(JobRow.state)
        query = query.where(JobRow.kind == self._kind, JobRow.deleted_at.is_(None))
        async with self._db.read() as session:
            counts = {JobState(state): count for state, count in await session.execute(query)}
        return {state: counts.get(state, 0) for state in JobState}

    def _select(self) -> sa.Select[JobRow]:
        return sa.select(JobRow).where(JobRow.kind == self._kind, JobRow.deleted_at.is_(None))

    def _unheld(self) -> sa.ColumnElement[bool]:
        return sa.or_(JobRow.lease_expires_at.is_(None), JobRow.lease_expires_at <= self._now())

    def _has_label(self, key: str, value: str) -> sa.ColumnElement[bool]:
        pairs = sa.func.json_each(JobRow.labels) if self._db.is_sqlite else sa.func.json_each_text(JobRow.labels)
        pair = pairs.table_valued(sa.column("key", sa.String()), sa.column("value", sa.String()))
        return sa.exists().where(pair.c.key == key, pair.c.value == value)

    async def _fetch(self, query: sa.Select[JobRow]) -> tuple[Job, ...]:
        async with self._db.read() as session:
            return tuple(job_of(row) for row in await session.scalars(query))

    async def _row(self, session: AsyncSession, job_id: str) -> JobRow:
        row = await session.scalar(self._select().where(JobRow.id == job_id))
        if row is None:
            raise _not_found(job_id)
        return row

    async def _number_of(self, session: AsyncSession, project: str, page_token: str) -> int:
        # A deleted job still marks its place.
        query = sa.select(JobRow.number).where(JobRow.kind == self._kind, JobRow.project == project, JobRow.id == page_token)
        number = await session.scalar(query)
        if number is None:
            raise InvalidArgumentError("Got a page token that no list of jobs gave; pass next_page_token unchanged.", param="page_token")
        return number

    async def _insert(
        self,
        session: AsyncSession,
        job_id: str,
        project: str,
        request_id: str,
        body_sha256: str,
        spec: dict[str, object],
        labels: dict[str, str],
        progress: dict[str, object],
    ) -> bool:
        """False if the request id is taken, also by a create that commits only now: the database waits for that one."""
        insert = sqlite.insert(JobRow) if self._db.is_sqlite else postgresql.insert(JobRow)
        now = self._now()
        values = {
            JobRow.id: job_id,
            JobRow.kind: self._kind,
            JobRow.project: project,
            JobRow.request_id: request_id,
            JobRow.body_sha256: body_sha256,
            JobRow.state: JobState.QUEUED.value,
            JobRow.wanted: Wanted.NONE.value,
            JobRow.spec: spec,
            JobRow.result: {},
            JobRow.progress: progress,
            JobRow.labels: labels,
            JobRow.epoch: 0,
            JobRow.last_sequence: 0,
            JobRow.created_at: now,
            JobRow.updated_at: now,
        }
        statement = insert.values(values).on_conflict_do_nothing(index_elements=[JobRow.kind, JobRow.project, JobRow.request_id])
        return await session.scalar(statement.returning(JobRow.number)) is not None

    async def _repeated(self, session: AsyncSession, project: str, request_id: str, body_sha256: str) -> JobRow:
        query = sa.select(JobRow).where(JobRow.kind == self._kind, JobRow.project == project, JobRow.request_id == request_id)
        row = (await session.scalars(query)).one()
        if row.body_sha256 != body_sha256:
            raise AlreadyExistsError(
                f"The request id {request_id!r} made job {row.id} from another body; use a new request id for a new job.",
                param="request_id",
            )
        if row.deleted_at is not None:
            raise AlreadyExistsError(
                f"The request id {request_id!r} made a job that was deleted; use a new request id.", param="request_id"
            )
        return row

    @contextlib.asynccontextmanager
    async def _change(self, job_id: str, *, epoch: int | None = None) -> AsyncIterator[tuple[AsyncSession, JobRow]]:
        async with self._db.begin() as session:
            # The row's lock is held until the commit, so sequences become visible in their order.
            row = await session.scalar(self._select().where(JobRow.id == job_id).with_for_update())
            if row is None:
                raise _not_found(job_id)
            if epoch is not None:
                _check_epoch(row, epoch)
            yield session, row
        for changed in self._watchers.get(job_id, ()):
            changed.set()

    def _record(self, session: AsyncSession, row: JobRow, event_type: str, level: EventLevel, message: str, data: JsonObject) -> None:
        row.last_sequence += 1
        row.updated_at = self._now()
        event = JobEventRow(
            job_number=row.number,
            sequence=row.last_sequence,
            created_at=row.updated_at,
            level=level.value,
            type=event_type,
            message=message,
            state=row.state,
            data=_stored(data, "data"),
        )
        session.add(event)

    async def _news(self, job_id: str, after_sequence: int) -> tuple[Job, tuple[JobEvent, ...]]:
        async with self._db.read() as session:
            row = await self._row(session, job_id)
            if row.last_sequence <= after_sequence:
                return job_of(row), ()
            # No later than the job just read: `until` must not judge an older job than the events show.
            query = sa.select(JobEventRow).where(
                JobEventRow.job_number == row.number, JobEventRow.sequence > after_sequence, JobEventRow.sequence <= row.last_sequence
            )
            events = await session.scalars(query.order_by(JobEventRow.sequence).limit(_WATCH_BATCH))
            return job_of(row), tuple(event_of(event) for event in events)


def _not_found(job_id: str) -> NotFoundError:
    return NotFoundError(f"No job {job_id!r} in this project. Check the id; deleted jobs are gone for good.")


def _check_epoch(row: JobRow, epoch: int) -> None:
    held = row.lease_expires_at is not None
    if held and row.epoch == epoch:
        return
    holder = f"epoch {row.epoch} holds it now" if held else f"nobody holds it now, and epoch {row.epoch} was the last"
    raise AbortedError(f"Epoch {epoch} does not hold job {row.id}: {holder}. Stop this attempt; nothing was written.", code="stale_epoch")


def _merge(row: JobRow, *, result: JsonObject | None, progress: JsonObject | None) -> None:
    if result:
        row.result = {**row.result, **_stored(result, "result")}
    if progress:
        row.progress = {**row.progress, **_stored(progress, "progress")}


def _enter(row: JobRow, state: JobState) -> None:
    """What comes with `state`, at the time of the event just recorded."""
    if not state.is_active:
        _drop_lease(row)
    if state == JobState.RUNNING and row.started_at is None:
        row.started_at = row.updated_at
    if state.is_final:
        row.finished_at = row.updated_at
    if state.is_final or (state == JobState.PAUSED and row.wanted == Wanted.PAUSE):
        row.wanted = Wanted.NONE.value


def _drop_lease(row: JobRow) -> None:
    row.lease_holder = None
    row.lease_expires_at = None


def _stored(value: JsonObject, what: str) -> dict[str, object]:
    canonical_json(value, what=what)
    return dict(value)
