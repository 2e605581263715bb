"""Streaming one object out, checked against its digest at the end."""

from __future__ import annotations

import hashlib
import io
import time
from typing import TYPE_CHECKING

from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from finery_common.artifacts.client import S3Client
from finery_common.artifacts.manifest import ObjectEntry
from finery_common.artifacts.metrics import ARTIFACT_BYTES, ARTIFACT_FAILURES
from finery_common.errors import DataLossError, UnavailableError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class ObjectReader(io.RawIOBase):
    """A binary file over one object, from `offset` bytes on; wrap it in `io.BufferedReader` or `io.TextIOWrapper` as needed.

    The read that meets the end raises DataLossError if the bytes differ from the manifest, unless only a part was asked for. A connection
    lost on the way is taken up again where it broke; UnavailableError if that makes no progress for the store's deadline.
    """

    def __init__(self, client: S3Client, *, key: str, entry: ObjectEntry, offset: int = 0) -> None:
        super().__init__()
        self._client = client
        self._key = key
        self.entry = entry
        self._position = offset
        self._is_whole = offset == 0
        self._sha256 = hashlib.sha256()
        self._response: BaseHTTPResponse | None = client.open(key, offset=offset) if offset < entry.size_bytes else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._read(min(len(view), self.entry.size_bytes - self._position))
        view[: len(data)] = data
        self._sha256.update(data)
        self._position += len(data)
        ARTIFACT_BYTES.labels("in").inc(len(data))
        if self._is_whole and self._position == self.entry.size_bytes and self._sha256.hexdigest() != self.entry.sha256:
            raise self._damaged(f"SHA-256 {self._sha256.hexdigest()}")
        return len(data)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response.release_conn()
            self._response = None
        super().close()

    def _read(self, size_bytes: int) -> bytes:
        if size_bytes == 0:
            return b""
        started_s = time.monotonic()
        while True:
            try:
                if self._response is None:
                    self._response = self._client.open(self._key, offset=self._position)
                # Raw: an object that claims to be compressed must not grow on its way in.
                if data := self._response.read(size_bytes, decode_content=False):
                    return data
                raise self._damaged(f"{self._position} bytes")
            except (HTTPError, OSError) as error:
                self._response = None
                if time.monotonic() - started_s > self._client.settings.retry_deadline_s:
                    ARTIFACT_FAILURES.labels("get").inc()
                    message = f"Reading {self._key} broke off at byte {self._position} ({type(error).__name__}); repeat the request."
                    raise UnavailableError(message) from error
                time.sleep(0.5)

    def _damaged(self, got: str) -> DataLossError:
        ARTIFACT_FAILURES.labels("verify").inc()
        return DataLossError(
            f"{self._key} is damaged: got {got}, wanted {self.entry.size_bytes} bytes of SHA-256 {self.entry.sha256}. "
            "Restore the object from a backup or make the artifact again."
        )
