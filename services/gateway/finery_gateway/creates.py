"""Creates that may arrive twice: which request id the inner service is asked with.

A client repeats a POST whose answer it did not get. An `Idempotency-Key` names the request for 24 hours; without one, a repeat is what
`x-stainless-retry-count` says is one, with the same body, within a minute. A repeat gets the request id of the first, upon which the
owner of the resource answers with what exists. The claim is committed before the owner is asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import sqlalchemy as sa
from fastapi import Request
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from finery_common.database import Database
from finery_common.errors import AlreadyExistsError, FineryError, InvalidArgumentError
from finery_gateway.tables import CreateRow

KEY_LIFETIME = timedelta(hours=24)
REPEAT_WINDOW = timedelta(minutes=1)
MAX_KEY_LENGTH = 255

T = TypeVar("T")


@dataclass(frozen=True)
class Attempt:
    """How a create arrived. `retries` is 0 for the client's first try."""

    idempotency_key: str | None = None
    retries: int = 0

    @classmethod
    def of(cls, request: Request) -> Attempt:
        """Reads `Idempotency-Key` and `x-stainless-retry-count`. Raises InvalidArgumentError for a key that cannot be stored."""
        key = request.headers.get("idempotency-key")
        if key is not None and not 1 <= len(key) <= MAX_KEY_LENGTH:
            raise InvalidArgumentError(f"Idempotency-Key: got {len(key)} characters, wanted 1 to {MAX_KEY_LENGTH}; a UUID will do.")
        count = request.headers.get("x-stainless-retry-count", "0")
        return cls(key, int(count) if count.isdecimal() else 0)


def body_sha256(body: object) -> str:
    """The digest of plain data, the same for equal data."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()


class Creates:
    """The accepted creates of the last day."""

    def __init__(self, db: Database, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._db = db
        self._now = now

    async def run(
        self, project: str, *, collection: str, attempt: Attempt, body: object, request_id: str, create: Callable[[str], Awaitable[T]]
    ) -> T:
        """Calls `create` with this create's request id, or with that of the one it repeats; `request_id` is a fresh one.

        A create that is refused leaves its key free for a corrected body. Raises AlreadyExistsError for a used key with another body.
        """
        try:
            async with self._db.begin() as session:
                claimed = await self.claim(
                    session, project, collection=collection, attempt=attempt, digest=body_sha256(body), request_id=request_id
                )
        except IntegrityError:
            # Another process claimed the same key at the same moment: now its row is there.
            async with self._db.begin() as session:
                claimed = await self.claim(
                    session, project, collection=collection, attempt=attempt, digest=body_sha256(body), request_id=request_id
                )
        try:
            return await create(claimed)
        except FineryError as error:
            if error.http_status < 500 and claimed == request_id:
                await self._release(project, collection=collection, request_id=request_id)
            raise

    async def claim(self, session: AsyncSession, project: str, *, collection: str, attempt: Attempt, digest: str, request_id: str) -> str:
        """Records the create inside the caller's transaction, unless it repeats one; answers the request id that holds.

        Raises AlreadyExistsError for a used key with another body.
        """
        now = self._now()
        await session.execute(sa.delete(CreateRow).where(CreateRow.created_at < now - KEY_LIFETIME))
        mine = sa.select(CreateRow).where(CreateRow.project == project, CreateRow.collection == collection)
        if attempt.idempotency_key is not None:
            row = await session.scalar(mine.where(CreateRow.idempotency_key == attempt.idempotency_key))
            if row is not None and row.body_sha256 != digest:
                raise AlreadyExistsError(
                    "This Idempotency-Key was used within 24 hours with another body; send a new key for a new request.",
                    code="idempotency_key_reused",
                )
        elif attempt.retries > 0:
            recent = mine.where(CreateRow.body_sha256 == digest, CreateRow.created_at >= now - REPEAT_WINDOW)
            row = await session.scalar(recent.order_by(CreateRow.number.desc()).limit(1))
        else:
            row = None
        if row is not None:
            return row.request_id
        session.add(
            CreateRow(
                project=project,
                collection=collection,
                idempotency_key=attempt.idempotency_key,
                body_sha256=digest,
                request_id=request_id,
                created_at=now,
            )
        )
        await session.flush()
        return request_id

    async def _release(self, project: str, *, collection: str, request_id: str) -> None:
        async with self._db.begin() as session:
            await session.execute(
                sa.delete(CreateRow).where(
                    CreateRow.project == project, CreateRow.collection == collection, CreateRow.request_id == request_id
                )
            )
