"""The tables of `JobStore` as SQLAlchemy sees them; the migrations under `migrations` create them."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from finery_common.database import UtcDateTime
from finery_common.jobs.model import EventLevel, Job, JobEvent, JobState, Wanted

_Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class Base(DeclarativeBase):
    """The metadata that belongs to the version table `jobs_version`."""


class JobRow(Base):
    """One job. `number` is the order of creation; a row is never removed, so neither ids nor request ids are used twice."""

    __tablename__ = "jobs"
    __table_args__ = (
        sa.UniqueConstraint("kind", "project", "request_id"),
        sa.Index("jobs_by_project", "kind", "project", "number"),
        sa.Index("jobs_by_state", "kind", "state", "number"),
        {"sqlite_autoincrement": True},
    )

    number: Mapped[int] = mapped_column(_Number, sa.Identity(), primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(64), unique=True)
    kind: Mapped[str] = mapped_column(sa.String(32))
    project: Mapped[str] = mapped_column(sa.String(64))
    request_id: Mapped[str] = mapped_column(sa.String(128))
    body_sha256: Mapped[str] = mapped_column(sa.String(64))
    state: Mapped[str] = mapped_column(sa.String(16))
    wanted: Mapped[str] = mapped_column(sa.String(16))
    spec: Mapped[dict[str, object]] = mapped_column(sa.JSON())
    result: Mapped[dict[str, object]] = mapped_column(sa.JSON())
    error: Mapped[dict[str, object] | None] = mapped_column(sa.JSON(none_as_null=True))
    progress: Mapped[dict[str, object]] = mapped_column(sa.JSON())
    # `metadata` is SQLAlchemy's own name on a mapped class.
    labels: Mapped[dict[str, str]] = mapped_column("metadata", sa.JSON())
    epoch: Mapped[int]
    lease_holder: Mapped[str | None] = mapped_column(sa.String(256))
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    last_sequence: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime())
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime())


class JobEventRow(Base):
    """One change of a job; `sequence` counts from 1 within the job, without gaps."""

    __tablename__ = "job_events"
    __table_args__ = (sa.Index("job_events_by_type", "job_number", "type", "sequence"),)

    job_number: Mapped[int] = mapped_column(_Number, sa.ForeignKey("jobs.number"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    level: Mapped[str] = mapped_column(sa.String(8))
    type: Mapped[str] = mapped_column(sa.String(32))
    message: Mapped[str] = mapped_column(sa.Text())
    state: Mapped[str] = mapped_column(sa.String(16))
    data: Mapped[dict[str, object]] = mapped_column(sa.JSON())


def job_of(row: JobRow) -> Job:
    """The row as a value."""
    return Job(
        id=row.id,
        kind=row.kind,
        project=row.project,
        state=JobState(row.state),
        spec=row.spec,
        result=row.result,
        error=row.error,
        progress=row.progress,
        metadata=row.labels,
        wanted=Wanted(row.wanted),
        epoch=row.epoch,
        lease_expires_at=row.lease_expires_at,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        updated_at=row.updated_at,
        last_sequence=row.last_sequence,
    )


def event_of(row: JobEventRow) -> JobEvent:
    """The row as a value."""
    return JobEvent(
        sequence=row.sequence,
        created_at=row.created_at,
        level=EventLevel(row.level),
        type=row.type,
        message=row.message,
        state=JobState(row.state),
        data=row.data,
    )
