"""Publishing: objects first, the manifest last and conditionally.

Every writer puts its objects into a folder of its own below the artifact's prefix (`objects/<32 hex>/`), which the manifest
names. So two attempts at one artifact never write the same key, the loser's bytes never replace the winner's, and what the
loser leaves is for `discard` or the sweep.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from pydantic import JsonValue

from finery_common.artifacts.client import S3Client
from finery_common.artifacts.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    ArtifactKind,
    ArtifactRef,
    Manifest,
    ObjectEntry,
    check_object_name,
    check_prefix,
    parse_manifest,
)
from finery_common.artifacts.upload import MAX_PARTS, PART_SIZE_BYTES, ObjectUpload
from finery_common.errors import AlreadyExistsError, DataLossError, FineryError, InvalidArgumentError

_READ_BYTES = 1 << 20


class ArtifactWriter:
    """Collects one artifact's objects and publishes them. As a context manager it discards what was not published."""

    def __init__(self, client: S3Client, *, prefix: str, kind: ArtifactKind, size_bytes: int | None = None) -> None:
        self._client = client
        self._size_bytes = size_bytes
        self.prefix = check_prefix(prefix)
        self.kind: ArtifactKind = kind
        self.folder = f"objects/{secrets.token_hex(16)}/"
        self._started: set[str] = set()
        self._entries: dict[str, ObjectEntry] = {}
        self._manifest: Manifest | None = None
        self._ref: ArtifactRef | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ref is None:
            self.discard()

    def put_bytes(self, name: str, *, data: bytes) -> ObjectEntry:
        """Stores `data` as object `name`. Raises AlreadyExistsError if this writer has that name."""
        upload = self.start_object(name)
        return self._finished(upload, [data])

    def put_file(self, name: str, *, path: Path) -> ObjectEntry:
        """Stores a local file as object `name`."""
        part_size_bytes = max(PART_SIZE_BYTES, -(-path.stat().st_size // (MAX_PARTS - 1)))
        with path.open("rb") as file:
            return self._put_stream(self.start_object(name, part_size_bytes=part_size_bytes), file)

    def put_folder(self, folder: Path) -> list[ObjectEntry]:
        """Stores every file below `folder` under its relative path."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [self.put_file(path.relative_to(folder).as_posix(), path=path) for path in files]

    def put_stream(self, name: str, *, file: BinaryIO) -> ObjectEntry:
        """Stores what `file` yields up to its end as object `name`, in parts."""
        return self._put_stream(self.start_object(name), file)

    def start_object(self, name: str, *, part_size_bytes: int = PART_SIZE_BYTES) -> ObjectUpload:
        """An upload to feed by hand; hand what its `finish` returns to `record`."""
        if check_object_name(name) in self._started:
            raise AlreadyExistsError(f"{self.prefix} already has an object {name}; every object is written once")
        self._started.add(name)
        key = self.prefix + self.folder + name
        return ObjectUpload(self._client, key=key, name=name, part_size_bytes=part_size_bytes, artifact_bytes=self._size_bytes)

    def record(self, entry: ObjectEntry) -> ObjectEntry:
        """Notes a finished object for the manifest."""
        self._entries[entry.name] = entry
        return entry

    def publish(
        self,
        *,
        made_from: Mapping[str, str],
        spec: Mapping[str, JsonValue],
        attempt: str,
        metadata: Mapping[str, JsonValue] | None = None,
    ) -> ArtifactRef:
        """Writes the manifest if the prefix has none: from then on the artifact exists.

        Repeating it, as after an UnavailableError, gives the same reference. Raises AlreadyExistsError where another
        writer has published here, DataLossError where the store lost an object meanwhile, and InvalidArgumentError for more
        objects than a manifest holds.
        """
        if self._manifest is None:
            self._manifest = Manifest(
                kind=self.kind,
                folder=self.folder,
                objects=tuple(self._entries[name] for name in sorted(self._entries)),
                made_from=dict(made_from),
                spec=dict(spec),
                attempt=attempt,
                metadata=dict(metadata or {}),
                created_at=datetime.now(UTC),
            )
        self._check_stored(self._manifest)
        key, data = self.prefix + MANIFEST_NAME, self._manifest.to_bytes()
        if len(data) > MAX_MANIFEST_BYTES:
            raise InvalidArgumentError(
                f"{key} would have {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read; put fewer objects in it."
            )
        if not self._client.put_new(key, data):
            winner = parse_manifest(self._client.get(key, max_bytes=MAX_MANIFEST_BYTES), key=key)
            # Our own manifest may be there: its answer was lost and the request repeated.
            if winner.sha256 != self._manifest.sha256:
                raise AlreadyExistsError(
                    f"{self.prefix} was published by attempt {winner.attempt!r} at {winner.created_at:%Y-%m-%d %H:%M:%S} UTC; "
                    f"attempt {attempt!r} cannot replace it. Publish under another name."
                )
        self._ref = self._manifest.ref(self.prefix)
        return self._ref

    def discard(self) -> None:
        """Removes what this writer stored; never anything published. Failing to do so is no error: the sweep does it later."""
        try:
            keys = [item.key for item in self._client.list(self.prefix + self.folder)]
            if keys and self._ref is None and not self._is_published():
                self._client.remove(keys)
        except FineryError:
            return

    def _is_published(self) -> bool:
        """Whether the manifest in the store is ours, though no answer of `publish` said so."""
        if self._manifest is None:
            return False
        key = self.prefix + MANIFEST_NAME
        if not any(item.key == key for item in self._client.list(key)):
            return False
        return self._client.get(key, max_bytes=MAX_MANIFEST_BYTES) == self._manifest.to_bytes()

    def _put_stream(self, upload: ObjectUpload, file: BinaryIO) -> ObjectEntry:
        return self._finished(upload, iter(lambda: file.read(_READ_BYTES), b""))

    def _finished(self, upload: ObjectUpload, chunks: Iterable[bytes]) -> ObjectEntry:
        try:
            for chunk in chunks:
                upload.write(chunk)
            return self.record(upload.finish())
        except BaseException:
            upload.abort()
            raise

    def _check_stored(self, manifest: Manifest) -> None:
        base = self.prefix + self.folder
        stored = {item.key.removeprefix(base): item.size_bytes for item in self._client.list(base)}
        lost = [entry.name for entry in manifest.objects if stored.get(entry.name) != entry.size_bytes]
        if lost:
            raise DataLossError(f"{self.prefix}: {len(lost)} objects are not in the store as written, such as {lost[0]}; write it again.")
