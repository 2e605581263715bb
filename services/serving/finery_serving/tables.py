"""The tables of serving as SQLAlchemy sees them; the migrations under `migrations` create them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from finery_common.database import Database, UtcDateTime

type_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class Base(DeclarativeBase):
    """The metadata that belongs to the version table `serving_version`."""


class RolloutRow(Base):
    """One request to put a version under an alias. Rows stay, so that a request id is never used twice.

    A `base_model` of "" is the alias' own: one that an agent of an earlier release has asked for.
    """

    __tablename__ = "rollouts"
    __table_args__ = (
        sa.UniqueConstraint("project", "request_id"),
        sa.Index("rollouts_by_alias", "project", "alias", "number"),
        sa.Index("rollouts_by_state", "state"),
        {"sqlite_autoincrement": True},
    )

    number: Mapped[int] = mapped_column(type_number, sa.Identity(), primary_key=True)
    project: Mapped[str] = mapped_column(sa.String(64))
    alias: Mapped[str] = mapped_column(sa.String(256))
    request_id: Mapped[str] = mapped_column(sa.String(128))
    body_sha256: Mapped[str] = mapped_column(sa.String(64))
    version: Mapped[str] = mapped_column(sa.String(256))
    job_id: Mapped[str] = mapped_column(sa.String(128))
    adapter: Mapped[dict[str, object]] = mapped_column(sa.JSON())
    base_model: Mapped[str] = mapped_column(sa.String(256), default="")
    state: Mapped[str] = mapped_column(sa.String(16))
    error: Mapped[dict[str, object] | None] = mapped_column(sa.JSON(none_as_null=True))
    swap_s: Mapped[float | None]
    canary_weight: Mapped[int] = mapped_column(default=0)
    rolls_back: Mapped[bool] = mapped_column(default=False)
    replaced: Mapped[str] = mapped_column(sa.String(256), default="")
    traceparent: Mapped[str] = mapped_column(sa.String(64), default="")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime())


class RequestRow(Base):
    """A request that promoted or rolled back. Rows stay, so that a request id is never used twice."""

    __tablename__ = "alias_requests"

    project: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    request_id: Mapped[str] = mapped_column(sa.String(128), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(sa.String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())


class AliasRow(Base):
    """A public model name and what serves under it; `rollout_number` is its newest rollout. A version that is "" is none.

    `base_model` is that of what serves, of the newest rollout before the first flip; a `previous_base_model` of "" is the same.
    """

    __tablename__ = "aliases"

    project: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    alias: Mapped[str] = mapped_column(sa.String(256), primary_key=True)
    base_model: Mapped[str] = mapped_column(sa.String(256))
    version: Mapped[str] = mapped_column(sa.String(256))
    job_id: Mapped[str] = mapped_column(sa.String(128))
    adapter: Mapped[dict[str, object] | None] = mapped_column(sa.JSON(none_as_null=True))
    etag: Mapped[str] = mapped_column(sa.String(32))
    epoch: Mapped[int] = mapped_column(type_number)
    rollout_number: Mapped[int] = mapped_column(type_number, sa.ForeignKey("rollouts.number"))
    canary_version: Mapped[str] = mapped_column(sa.String(256), default="")
    canary_job_id: Mapped[str] = mapped_column(sa.String(128), default="")
    canary_adapter: Mapped[dict[str, object] | None] = mapped_column(sa.JSON(none_as_null=True))
    canary_weight: Mapped[int] = mapped_column(default=0)
    previous_version: Mapped[str] = mapped_column(sa.String(256), default="")
    previous_job_id: Mapped[str] = mapped_column(sa.String(128), default="")
    previous_adapter: Mapped[dict[str, object] | None] = mapped_column(sa.JSON(none_as_null=True))
    previous_base_model: Mapped[str] = mapped_column(sa.String(256), default="")
    pinned: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime())


class ReplicaRow(Base):
    """One agent with its vLLM, which alone writes it. `beat` grows while the agent lives; `state` is `registry.Replica`'s."""

    __tablename__ = "replicas"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    base_model: Mapped[str] = mapped_column(sa.String(256))
    address: Mapped[str] = mapped_column(sa.String(512))
    beat: Mapped[int] = mapped_column(type_number)
    state: Mapped[dict[str, Any]] = mapped_column(sa.JSON())


class LoadRequestRow(Base):
    """What any agent asks of a replica: to load a version that somebody waits for. The replica deletes it when that is done."""

    __tablename__ = "load_requests"

    replica_id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    version: Mapped[str] = mapped_column(sa.String(256), primary_key=True)
    adapter: Mapped[dict[str, object]] = mapped_column(sa.JSON())


class RevisionRow(Base):
    """One row, whose number changes with every change of the tables above but `replicas`: agents see by it that there is news."""

    __tablename__ = "revisions"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(type_number)


@asynccontextmanager
async def changing(database: Database) -> AsyncIterator[AsyncSession]:
    """A transaction whose changes the agents of other replicas see, as `Database.begin` otherwise."""
    async with database.begin() as session:
        yield session
        # Last, so that whoever holds this row waits for no other.
        await session.flush()
        await session.execute(sa.update(RevisionRow).values(number=RevisionRow.number + 1))
