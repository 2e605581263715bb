"""Uploaded files: rows in the gateway's database, bytes as artifacts `projects/<project>/files/<id>/` with one object, `content`.

Owns their life: received, published, listed, deleted with a tombstone. What their lines mean is dataprep's. A job's result file is not
stored here: `file-<hex>` of the job `ftjob-<hex>` is the metrics artifact that the training service published.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from finery_common.artifacts import ArtifactStore, ArtifactWriter, ObjectEntry, ObjectReader, put_chunks
from finery_common.database import Database
from finery_common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from finery_common.resource_names import new_id
from finery_gateway.creates import Attempt, Creates, body_sha256
from finery_gateway.metrics import UPLOAD_BYTES
from finery_gateway.multipart import FormReader
from finery_gateway.tables import FileRow

PURPOSE = "fine-tune"
CONTENT = "content"
MAX_FILENAME_LENGTH = 512
_READ_BYTES = 1 << 20
_SETTLE_AFTER = timedelta(minutes=10)


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file."""

    id: str
    project: str
    filename: str
    purpose: str
    size_bytes: int
    created_at: datetime


@dataclass(frozen=True)
class FilePage:
    """Some files, in the order asked for."""

    files: tuple[StoredFile, ...]
    has_more: bool


class Files:
    """The files of all projects. A method that names a file raises NotFoundError where the project has none of that id."""

    def __init__(self, db: Database, *, store: ArtifactStore, creates: Creates, limit_bytes: int) -> None:
        self._db = db
        self._store = store
        self._creates = creates
        self.limit_bytes = limit_bytes

    async def create(self, project: str, *, form: FormReader, attempt: Attempt) -> StoredFile:
        """Stores and publishes the form's file; committed when this returns. A client that leaves on the way leaves nothing behind."""
        filename = _checked_filename(await form.until_file())
        _check_fields(form.fields, complete=False)
        file_id = new_id("file-")
        writer = self._store.writer(_prefix(project, file_id), kind="file")
        try:
            entry = await put_chunks(writer, CONTENT, chunks=form.file_chunks())
            await form.rest()
            _check_fields(form.fields, complete=True)
            if entry.size_bytes == 0:
                raise InvalidArgumentError(
                    f"file: {filename!r} is empty; send a file with at least one row.", param="file", code="empty_file"
                )
            stored = await self._publish(project, file_id, filename=filename, writer=writer, entry=entry, attempt=attempt)
        except BaseException:
            # Runs to its end though the client has gone; what is published stays.
            await asyncio.shield(asyncio.to_thread(writer.discard))
            raise
        UPLOAD_BYTES.labels(project).inc(entry.size_bytes)
        return stored

    async def get(self, project: str, *, file_id: str) -> StoredFile:
        """The file, if it is not deleted."""
        return _shown(await self._row(project, file_id))

    async def list(self, project: str, *, after: str | None, limit: int, order: Literal["asc", "desc"], purpose: str | None) -> FilePage:
        """At most `limit` files by age, from behind `after`. Raises InvalidArgumentError for an `after` that the project has not."""
        newest_first = order == "desc"
        query = sa.select(FileRow).where(FileRow.project == project, FileRow.state == "ready")
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        async with self._db.read() as session:
            if after is not None:
                # A deleted file still marks its place.
                number = await session.scalar(sa.select(FileRow.number).where(FileRow.project == project, FileRow.id == after))
                if number is None:
                    raise InvalidArgumentError(f"after: got {after!r}, wanted the id of a file of this project", param="after")
                query = query.where(FileRow.number < number if newest_first else FileRow.number > number)
            query = query.order_by(FileRow.number.desc() if newest_first else FileRow.number).limit(limit + 1)
            rows = (await session.scalars(query)).all()
        return FilePage(tuple(_shown(row) for row in rows[:limit]), has_more=len(rows) > limit)

    async def open(self, project: str, *, file_id: str) -> AsyncIterator[bytes]:
        """The content as a stream; everything that can be known to fail fails before it is returned."""
        await self._row(project, file_id)
        return await open_object(self._store, prefix=_prefix(project, file_id), name=CONTENT)

    async def delete(self, project: str, *, file_id: str, users: Callable[[], Awaitable[tuple[str, ...]]]) -> None:
        """Leaves a tombstone and removes the bytes. Raises FailedPreconditionError while one of `users` (resource ids) needs them."""
        await self._row(project, file_id)
        if busy := await users():
            raise FailedPreconditionError(
                f"{file_id} is being used by {', '.join(busy[:5])}; wait until that is done, or cancel it, then delete the file.",
                code="file_in_use",
            )
        async with self._db.begin() as session:
            query = sa.update(FileRow).where(FileRow.id == file_id, FileRow.project == project, FileRow.state == "ready")
            await session.execute(query.values(state="deleting", deleted_at=datetime.now(UTC)))
        await self._remove(project, file_id)

    async def settle(self) -> None:
        """Finishes what a process that died left half done: publications without an answer, deletions without an end."""
        before = datetime.now(UTC) - _SETTLE_AFTER
        async with self._db.read() as session:
            late = sa.and_(FileRow.state == "publishing", FileRow.created_at < before)
            rows = (await session.scalars(sa.select(FileRow).where(sa.or_(FileRow.state == "deleting", late)).limit(100))).all()
        for row in rows:
            if row.state == "deleting" or not await asyncio.to_thread(self._store.exists, _prefix(row.project, row.id)):
                await self._remove(row.project, row.id)
            else:
                await self._set_state(row.id, "ready")

    async def _publish(
        self, project: str, file_id: str, *, filename: str, writer: ArtifactWriter, entry: ObjectEntry, attempt: Attempt
    ) -> StoredFile:
        created_at = datetime.now(UTC)
        row = FileRow(
            id=file_id,
            project=project,
            filename=filename,
            purpose=PURPOSE,
            size_bytes=entry.size_bytes,
            state="publishing",
            created_at=created_at,
            deleted_at=None,
        )
        async with self._db.begin() as session:
            session.add(row)
        metadata = {"filename": filename, "purpose": PURPOSE, "created_at": created_at.isoformat()}
        await asyncio.to_thread(writer.publish, made_from={}, spec={}, attempt=file_id, metadata=metadata)
        digest = body_sha256([filename, PURPOSE, entry.sha256])
        try:
            winner = await self._claim(project, file_id, attempt=attempt, digest=digest)
        except BaseException:
            await asyncio.shield(self._remove(project, file_id))
            raise
        if winner == file_id:
            return _shown(row)
        await self._remove(project, file_id)
        return await self.get(project, file_id=winner)

    async def _claim(self, project: str, file_id: str, *, attempt: Attempt, digest: str) -> str:
        """The id of the file that this create made, or repeats: one transaction makes the file visible and remembers the create."""
        for last in (False, True):
            try:
                async with self._db.begin() as session:
                    winner = await self._creates.claim(
                        session, project, collection="files", attempt=attempt, digest=digest, request_id=file_id
                    )
                    if winner == file_id:
                        await session.execute(sa.update(FileRow).where(FileRow.id == file_id).values(state="ready"))
                    return winner
            except IntegrityError:
                # The same key was claimed at the same moment: the second look finds it.
                if last:
                    raise
        raise AssertionError("the loop returns or raises")

    async def _remove(self, project: str, file_id: str) -> None:
        await asyncio.to_thread(self._store.delete, _prefix(project, file_id))
        await self._set_state(file_id, "deleted")

    async def _set_state(self, file_id: str, state: str) -> None:
        values: dict[str, object] = {"state": state}
        if state == "deleted":
            values["deleted_at"] = sa.func.coalesce(FileRow.deleted_at, datetime.now(UTC))
        async with self._db.begin() as session:
            await session.execute(sa.update(FileRow).where(FileRow.id == file_id).values(values))

    async def _row(self, project: str, file_id: str) -> FileRow:
        async with self._db.read() as session:
            query = sa.select(FileRow).where(FileRow.id == file_id, FileRow.project == project, FileRow.state == "ready")
            row = await session.scalar(query)
        if row is None:
            raise no_file(file_id)
        return row


def no_file(file_id: str, *, param: str = "file_id") -> NotFoundError:
    """The error for a file that the project has not, or no longer."""
    return NotFoundError(
        f"There is no file {file_id} in this project, or it was deleted; list files to see what there is.",
        param=param,
        code="file_not_found",
    )


async def open_object(store: ArtifactStore, *, prefix: str, name: str) -> AsyncIterator[bytes]:
    """An object of an artifact as a stream of chunks. Raises NotFoundError before the first."""
    return chunks_of(await asyncio.to_thread(store.open, prefix, name))


async def chunks_of(reader: ObjectReader) -> AsyncIterator[bytes]:
    """What `reader` yields up to its end, which closes it."""
    try:
        while chunk := await asyncio.to_thread(reader.read, _READ_BYTES):
            yield chunk
    finally:
        reader.close()


def _prefix(project: str, file_id: str) -> str:
    return f"projects/{project}/files/{file_id}/"


def _shown(row: FileRow) -> StoredFile:
    return StoredFile(row.id, row.project, row.filename, row.purpose, row.size_bytes, row.created_at)


def _checked_filename(filename: str) -> str:
    if not 1 <= len(filename) <= MAX_FILENAME_LENGTH or any(unicodedata.category(char) == "Cc" for char in filename):
        raise InvalidArgumentError(
            f"file: got a file name of {len(filename)} characters, wanted 1 to {MAX_FILENAME_LENGTH} without control characters",
            param="file",
        )
    return filename


def _check_fields(fields: dict[str, str], *, complete: bool) -> None:
    for name in fields:
        if name.startswith("expires_after"):
            raise InvalidArgumentError(
                "expires_after: files are kept until they are deleted; leave it out.", param=name, code="not_supported"
            )
        if name != "purpose":
            raise InvalidArgumentError(f"{name}: unknown field; known are file, purpose", param=name)
    purpose = fields.get("purpose")
    if purpose is None and complete:
        raise InvalidArgumentError(f"purpose: missing; it is required: {PURPOSE!r}", param="purpose")
    if purpose not in (None, PURPOSE):
        raise InvalidArgumentError(
            f"purpose: got {purpose!r}, wanted {PURPOSE!r}, the one that is supported", param="purpose", code="not_supported"
        )
