"""The gateway's tables as SQLAlchemy sees them; the migrations under `migrations` create them."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from finery_common.database import Database, UtcDateTime

_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class Base(DeclarativeBase):
    """The metadata that belongs to the version table `gateway_version`."""


class ApiKeyRow(Base):
    """One API key, by its digest. A revoked one stays, so that the list says when it ended."""

    __tablename__ = "api_keys"
    __table_args__ = (sa.Index("api_keys_by_project", "project"),)

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    project: Mapped[str] = mapped_column(sa.String(63))
    digest: Mapped[str] = mapped_column(sa.String(64), unique=True)
    hint: Mapped[str] = mapped_column(sa.String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    requests_per_minute: Mapped[int | None] = mapped_column(sa.BigInteger())
    tokens_per_minute: Mapped[int | None] = mapped_column(sa.BigInteger())
    concurrent_streams: Mapped[int | None] = mapped_column(sa.BigInteger())


class FileRow(Base):
    """One uploaded file: `publishing`, `ready` or `deleted`. A deleted one stays as a tombstone; its id is never used again."""

    __tablename__ = "files"
    __table_args__ = (
        sa.Index("files_by_project", "project", "number"),
        sa.Index("files_by_state", "state"),
        {"sqlite_autoincrement": True},
    )

    number: Mapped[int] = mapped_column(_number, sa.Identity(), primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(32), unique=True)
    project: Mapped[str] = mapped_column(sa.String(63))
    filename: Mapped[str] = mapped_column(sa.String(512))
    purpose: Mapped[str] = mapped_column(sa.String(32))
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger())
    state: Mapped[str] = mapped_column(sa.String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime())


class CreateRow(Base):
    """One accepted create, remembered for a day so that a repeated one finds what the first made."""

    __tablename__ = "creates"
    __table_args__ = (
        sa.UniqueConstraint("project", "collection", "idempotency_key"),
        sa.Index("creates_by_body", "project", "collection", "body_sha256"),
        sa.Index("creates_by_age", "created_at"),
        {"sqlite_autoincrement": True},
    )

    number: Mapped[int] = mapped_column(_number, sa.Identity(), primary_key=True)
    project: Mapped[str] = mapped_column(sa.String(63))
    collection: Mapped[str] = mapped_column(sa.String(32))
    idempotency_key: Mapped[str | None] = mapped_column(sa.String(255))
    body_sha256: Mapped[str] = mapped_column(sa.String(64))
    request_id: Mapped[str] = mapped_column(sa.String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())


async def migrate(db: Database) -> None:
    """Brings the gateway's tables to their newest revision."""
    await db.migrate("finery_gateway.migrations", version_table="gateway_version")
