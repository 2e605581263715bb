"""Copying an artifact's files into a folder: resumed where it broke off, every digest checked, nothing half done under a final name.

What has come of a file lies beside it as `.<name>.<digest>.partial` until its SHA-256 is right. Bytes come straight from the object store
by URLs that the gateway signs; where the store cannot be reached from here, through the gateway. Neither the URLs nor the key go anywhere
else: no error names a URL, and the store is not sent the key.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import httpx

from finery_cli.client import Gateway
from finery_common.errors import (
    AbortedError,
    AlreadyExistsError,
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)

_ATTEMPTS = 6
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 15.0
_BLOCK_BYTES = 1 << 20
_SPARE_BYTES = 16 << 20
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)


@dataclass(frozen=True)
class RemoteFile:
    """A file of an artifact."""

    name: str
    size_bytes: int
    sha256: str


OnBytes = Callable[[int], None]
"""Told how many bytes more are there."""


def list_files(gateway: Gateway, address: str) -> tuple[RemoteFile, ...]:
    """What the artifact `models/conv-…` consists of."""
    found = gateway.native.get(f"/artifacts/{quote(address)}/files").json()
    return tuple(RemoteFile(item["name"], item["size_bytes"], item["sha256"]) for item in found)


def download(
    gateway: Gateway, address: str, folder: Path, *, files: Sequence[RemoteFile], on_bytes: OnBytes, say: Callable[[str], None]
) -> list[Path]:
    """Puts `files` of an artifact below `folder`; a file that is there already with the right content is left as it is.

    Raises AlreadyExistsError for one with other content, ResourceExhaustedError where the disk is too small, DataLossError for bytes that
    stay wrong and UnavailableError where the connection keeps breaking; whatever has come is gone on from by the next call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = {file: _target(folder, file.name) for file in files}
    missing = [file for file in files if not _is_there(file, targets[file], on_bytes)]
    _check_room(folder, sum(file.size_bytes - _size(_partial(file, targets[file])) for file in missing))
    with httpx.Client(timeout=_TIMEOUT) as store:
        source = _Source(gateway, address, store, say)
        for file in missing:
            targets[file].parent.mkdir(parents=True, exist_ok=True)
            _fetch(source, file, targets[file], on_bytes)
    return list(targets.values())


class _Source:
    """Where bytes come from: the store, until it turns out to be out of reach."""

    def __init__(self, gateway: Gateway, address: str, store: httpx.Client, say: Callable[[str], None]) -> None:
        self._gateway = gateway
        self._address = quote(address)
        self._store = store
        self._say = say
        self._is_direct = True

    @contextlib.contextmanager
    def open(self, file: RemoteFile, *, offset: int) -> Iterator[httpx.Response]:
        """A good answer with what lies behind `offset`, or with the whole. Raises httpx.TransportError, UnavailableError, NotFoundError."""
        path = f"/artifacts/{self._address}/files/{quote(file.name)}"
        headers = {"range": f"bytes={offset}-"} if offset else {}
        with contextlib.ExitStack() as stack:
            answer: httpx.Response | None = None
            if self._is_direct:
                url = str(self._gateway.native.post(f"{path}/download-url").json()["url"])
                try:
                    answer = stack.enter_context(self._store.stream("GET", url, headers=headers))
                except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
                    self._is_direct = False
                    host = httpx.URL(url).netloc.decode()
                    self._say(f"the object store cannot be reached at {host} ({type(error).__name__}); going through the gateway")
            if answer is None:
                answer = stack.enter_context(self._gateway.native.stream("GET", path, headers=headers))
            elif answer.status_code == 404:
                raise NotFoundError(f"{self._address} is gone: it was deleted while {file.name} was being downloaded.")
            elif answer.is_error or answer.is_redirect:
                raise UnavailableError(f"the object store answered HTTP {answer.status_code}")
            yield answer


def _fetch(source: _Source, file: RemoteFile, target: Path, on_bytes: OnBytes) -> None:
    """One file, over as many connections as it takes while each brings something."""
    partial = _partial(file, target)
    with partial.open("ab+") as content:
        _lock(content, target)
        copy = _Copy(file, content, on_bytes)
        _fill(source, copy)
        if not copy.is_right:
            # What an earlier call has left may be what is wrong: once more, all of it.
            copy.clear()
            _fill(source, copy)
        if not copy.is_right:
            partial.unlink()
            raise DataLossError(f"{file.name} came twice with another SHA-256 than {file.sha256}; the stored artifact may be damaged.")
        os.fsync(content.fileno())
        partial.replace(target)


def _fill(source: _Source, copy: _Copy) -> None:
    failures = 0
    while copy.size_bytes < copy.file.size_bytes:
        before = copy.size_bytes
        try:
            with source.open(copy.file, offset=before) as answer:
                copy.take(answer)
        except (httpx.TransportError, httpx.StreamError, httpx.HTTPStatusError, UnavailableError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            failures = 1 if copy.size_bytes > before else failures + 1
            if failures == _ATTEMPTS:
                raise UnavailableError(
                    f"The download of {copy.file.name} broke off at byte {copy.size_bytes} ({_reason(error)}); "
                    "the same command goes on from there."
                ) from None
            time.sleep(min(_MAX_WAIT_S, _FIRST_WAIT_S * 2 ** (failures - 1)))


class _Copy:
    """What is here of a file, in `content`, and its digest. Begins with what an earlier call has left."""

    def __init__(self, file: RemoteFile, content: BinaryIO, on_bytes: OnBytes) -> None:
        self.file = file
        self.size_bytes = 0
        self._content = content
        self._on_bytes = on_bytes
        self._sha256 = hashlib.sha256()
        content.seek(0)
        while block := content.read(_BLOCK_BYTES):
            self._count(block)
        if self.size_bytes > file.size_bytes:
            self.clear()

    @property
    def is_right(self) -> bool:
        return self._sha256.hexdigest() == self.file.sha256

    def clear(self) -> None:
        self._content.truncate(0)
        self._on_bytes(-self.size_bytes)
        self.size_bytes, self._sha256 = 0, hashlib.sha256()

    def take(self, answer: httpx.Response) -> None:
        """Appends what comes. Raises UnavailableError where it is not as much as is missing."""
        if self.size_bytes and answer.status_code != 206:
            self.clear()
        # As it comes: what waits for a block to fill up would be lost with the connection.
        for block in answer.iter_raw():
            if self.size_bytes + len(block) > self.file.size_bytes:
                break
            self._content.write(block)
            # Before it counts, so that a process that is killed leaves what it has said.
            self._content.flush()
            self._count(block)
        if self.size_bytes < self.file.size_bytes:
            raise UnavailableError("what came does not fit the file's size")

    def _count(self, block: bytes) -> None:
        self._sha256.update(block)
        self.size_bytes += len(block)
        self._on_bytes(len(block))


def _lock(content: BinaryIO, target: Path) -> None:
    try:
        fcntl.flock(content, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise AbortedError(f"{target} is being downloaded by another process; wait for it, or take another folder.") from error


def _is_there(file: RemoteFile, target: Path, on_bytes: OnBytes) -> bool:
    if not target.exists():
        return False
    if not target.is_file() or target.stat().st_size != file.size_bytes or _sha256(target) != file.sha256:
        raise AlreadyExistsError(
            f"{target} is there with other content than the artifact's {file.name}; move it away or take another folder."
        )
    on_bytes(file.size_bytes)
    return True


def _target(folder: Path, name: str) -> Path:
    """Where a file goes: below `folder`, whatever the server calls it."""
    target = folder / name
    if not name or ".." in Path(name).parts or Path(name).is_absolute() or not target.resolve().is_relative_to(folder.resolve()):
        raise InvalidArgumentError(f"The artifact has a file called {name!r}, which would lie outside of {folder}.")
    return target


def _partial(file: RemoteFile, target: Path) -> Path:
    return target.with_name(f".{target.name}.{file.sha256[:16]}.partial")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes and needed_bytes + _SPARE_BYTES > free_bytes:
        raise ResourceExhaustedError(
            f"The download needs {needed_bytes + _SPARE_BYTES:,} bytes and {free_bytes:,} are free at {folder}; take one on a larger disk."
        )


def _reason(error: Exception) -> str:
    """Without the URL that some of httpx's texts have."""
    return error.message if isinstance(error, UnavailableError) else type(error).__name__
