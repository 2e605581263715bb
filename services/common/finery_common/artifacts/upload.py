"""Uploads of unknown length, fed by chunks: memory holds one part whatever the size.

Owns the choice between one request and several parts, and the digest. Which keys exist is the writer's business.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finery_common.artifacts.client import S3Client
from finery_common.artifacts.manifest import ObjectEntry
from finery_common.errors import FineryError, InvalidArgumentError, ResourceExhaustedError

if TYPE_CHECKING:
    from finery_common.artifacts.writer import ArtifactWriter

PART_SIZE_BYTES = 16 << 20
MAX_PARTS = 10_000


class ObjectUpload:
    """One object on its way in: `write` chunks, then `finish`, or `abort`. Not for several threads at once.

    Raises ResourceExhaustedError where the store is full, with the `artifact_bytes` that were to be stored, where they are known.
    """

    def __init__(
        self, client: S3Client, *, key: str, name: str, part_size_bytes: int = PART_SIZE_BYTES, artifact_bytes: int | None = None
    ) -> None:
        self._client = client
        self._key = key
        self._name = name
        self._part_size_bytes = part_size_bytes
        self._artifact_bytes = artifact_bytes
        self._pending = bytearray()
        self._sha256 = hashlib.sha256()
        self._upload_id: str | None = None
        self._etags: list[str] = []
        self.size_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Takes the next bytes; sends a part whenever one is full. Raises InvalidArgumentError past 10,000 parts."""
        self._sha256.update(chunk)
        self.size_bytes += len(chunk)
        self._pending += chunk
        while len(self._pending) > self._part_size_bytes:
            self._send_part(bytes(self._pending[: self._part_size_bytes]))
            del self._pending[: self._part_size_bytes]

    def room_bytes(self) -> int:
        """How much can be written before a request goes out."""
        return self._part_size_bytes - len(self._pending)

    def finish(self) -> ObjectEntry:
        """Sends the rest; the object is in the store when this returns."""
        if self._upload_id is not None:
            self._send_part(bytes(self._pending))
        with self._saying_what_is_needed():
            if self._upload_id is None:
                self._client.put(self._key, bytes(self._pending))
            else:
                self._client.finish_multipart(self._key, upload_id=self._upload_id, etags=self._etags, size_bytes=self.size_bytes)
        return ObjectEntry(name=self._name, size_bytes=self.size_bytes, sha256=self._sha256.hexdigest())

    def abort(self) -> None:
        """Drops what was sent. Failing to do so is no error: the sweep removes it later."""
        if self._upload_id is None:
            return
        try:
            self._client.abort_multipart(self._key, upload_id=self._upload_id)
        except FineryError:
            return

    def _send_part(self, data: bytes) -> None:
        if len(self._etags) >= MAX_PARTS:
            limit_gib = MAX_PARTS * self._part_size_bytes / 2**30
            raise InvalidArgumentError(f"{self._name} is larger than {limit_gib:.0f} GiB, the most one object can hold; split it.")
        with self._saying_what_is_needed():
            if self._upload_id is None:
                self._upload_id = self._client.start_multipart(self._key)
            self._etags.append(self._client.put_part(self._key, upload_id=self._upload_id, number=len(self._etags) + 1, data=data))

    @contextmanager
    def _saying_what_is_needed(self) -> Iterator[None]:
        try:
            yield
        except ResourceExhaustedError as error:
            if self._artifact_bytes is None:
                raise
            message = f"{error.message} The whole artifact has {self._artifact_bytes:,} bytes; nothing of it was published."
            raise ResourceExhaustedError(message, code=error.code) from error


async def put_chunks(writer: ArtifactWriter, name: str, *, chunks: AsyncIterator[bytes]) -> ObjectEntry:
    """Stores an async stream as object `name`. A thread is taken only while a part is sent, so slow clients hold none.

    An error from `chunks`, or cancellation, drops the object and propagates.
    """
    upload = writer.start_object(name)
    try:
        async for chunk in chunks:
            if len(chunk) <= upload.room_bytes():
                upload.write(chunk)
            else:
                await asyncio.to_thread(upload.write, chunk)
        return writer.record(await asyncio.to_thread(upload.finish))
    except BaseException:
        await asyncio.shield(asyncio.to_thread(upload.abort))
        raise
