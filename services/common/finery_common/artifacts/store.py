"""The artifact store: reading, listing, deleting and sweeping published artifacts.

Readers trust manifests and nothing else. Writing is the writer's, local copies are the cache's; who may see or delete what,
and whether something still refers to an artifact, is the services' business.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from finery_common.artifacts import cache, download
from finery_common.artifacts.client import S3Client, S3Settings, StoredObject
from finery_common.artifacts.download import DEFAULT_LIFETIME_S, DownloadUrl
from finery_common.artifacts.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    ArtifactKind,
    ArtifactRef,
    Manifest,
    ObjectEntry,
    artifact_prefix_of,
    check_prefix,
    parse_manifest,
)
from finery_common.artifacts.metrics import ARTIFACT_FAILURES
from finery_common.artifacts.reader import ObjectReader
from finery_common.artifacts.writer import ArtifactWriter
from finery_common.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, NotFoundError

_DAY_S = 24 * 3600.0
_PROBE_PREFIX = "finery-probe/"


def _accept(_manifest: Manifest) -> None:
    """Every manifest will do."""


class ArtifactStore:
    """Artifacts in one bucket. Safe to share between threads; every method blocks.

    Any method raises UnavailableError when the store stays gone past its deadline and FailedPreconditionError when it
    refuses the keys.
    """

    def __init__(self, client: S3Client) -> None:
        self._client = client

    @classmethod
    def connect(cls, settings: S3Settings) -> Self:
        """A store ready for use: its bucket is there and it honours conditional writes."""
        client = S3Client(settings)
        client.ensure_bucket()
        store = cls(client)
        store.probe_conditional_writes()
        return store

    @property
    def settings(self) -> S3Settings:
        return self._client.settings

    def probe_conditional_writes(self) -> None:
        """Raises FailedPreconditionError if the store writes over a key in spite of `If-None-Match: *`."""
        key = f"{_PROBE_PREFIX}{secrets.token_hex(16)}"
        self._client.put(key, b"first")
        try:
            if self._client.put_new(key, b"second"):
                raise FailedPreconditionError(
                    f"The object store at {self.settings.endpoint} ignores 'If-None-Match: *', so an artifact could be published twice. "
                    "Use one that honours it: SeaweedFS 4, MinIO from 2024-11 on, Amazon S3."
                )
        finally:
            self._client.remove([key])

    def writer(self, prefix: str, *, kind: ArtifactKind, size_bytes: int | None = None) -> ArtifactWriter:
        """A writer for a new artifact under `prefix`, of `size_bytes` where that is known, which a store that is full is then told of.

        S3 has no call for the room there is: only a write tells. Raises InvalidArgumentError for a prefix outside the layout.
        """
        return ArtifactWriter(self._client, prefix=prefix, kind=kind, size_bytes=size_bytes)

    def manifest(self, artifact: ArtifactRef | str) -> Manifest:
        """The manifest of a reference or prefix.

        Raises NotFoundError where there is none: never published, or deleted. Raises DataLossError where a reference's
        digest differs from what is stored.
        """
        prefix = check_prefix(artifact if isinstance(artifact, str) else artifact.prefix)
        key = prefix + MANIFEST_NAME
        try:
            data = self._client.get(key, max_bytes=MAX_MANIFEST_BYTES)
        except NotFoundError as error:
            raise NotFoundError(f"There is no artifact {prefix}: it was never published or has been deleted.") from error
        digest = hashlib.sha256(data).hexdigest()
        manifest = parse_manifest(data, key=key)
        wanted = manifest.sha256 if isinstance(artifact, str) else artifact.manifest_sha256
        if digest != wanted:
            ARTIFACT_FAILURES.labels("verify").inc()
            raise DataLossError(f"{key} is not what was published: got SHA-256 {digest}, wanted {wanted}. Restore it from a backup.")
        return manifest

    def exists(self, artifact: ArtifactRef | str) -> bool:
        """Whether it is published."""
        try:
            self.manifest(artifact)
        except NotFoundError:
            return False
        return True

    def ref(self, prefix: str) -> ArtifactRef:
        """The reference of what is published under `prefix`. Raises NotFoundError."""
        return self.manifest(prefix).ref(prefix)

    def open(self, artifact: ArtifactRef | str, name: str, *, offset: int = 0) -> ObjectReader:
        """A checked stream of one object, or an unchecked one of what lies behind `offset` bytes of it.

        Raises NotFoundError for an artifact or a name that is not there.
        """
        prefix, manifest, entry = self._entry(artifact, name)
        return self._open_entry(prefix, manifest, entry, offset=offset)

    def download_url(
        self, artifact: ArtifactRef | str, name: str, *, lifetime_s: int = DEFAULT_LIFETIME_S, file_name: str | None = None
    ) -> DownloadUrl:
        """A presigned URL for one object, under the store's public endpoint; saved as `file_name`, or the last part of `name`.

        It outlives a change of who may read the artifact, though not the artifact. Raises NotFoundError as `open` does, and
        InvalidArgumentError for a lifetime that is not from 1 s to 7 days.
        """
        prefix, manifest, entry = self._entry(artifact, name)
        key = prefix + manifest.folder + name
        return download.sign(self._client, key=key, entry=entry, lifetime_s=lifetime_s, file_name=file_name or name.rpartition("/")[2])

    def fetch(self, artifact: ArtifactRef | str, cache_dir: Path, *, check: Callable[[Manifest], None] = _accept) -> Path:
        """A local folder with the artifact's objects under their names, every digest checked on the way in.

        A reference whose copy is in the cache needs no store. Safe for any number of threads and processes at once. Treat
        the folder as read-only. Raises as `manifest` does, DataLossError for damaged bytes, ResourceExhaustedError for a full disk,
        and what `check` raises of the manifest before anything is copied.
        """
        if isinstance(artifact, ArtifactRef) and (folder := cache.cached(cache_dir, manifest_sha256=artifact.manifest_sha256)):
            return folder
        manifest = self.manifest(artifact)
        check(manifest)
        prefix = artifact if isinstance(artifact, str) else artifact.prefix
        return cache.stage(manifest, cache_dir=cache_dir, open_object=lambda entry: self._open_entry(prefix, manifest, entry))

    def list(self, prefix: str) -> Iterator[ArtifactRef]:
        """References of what is published below `prefix`, such as `projects/p/files/`, in key order."""
        if not prefix.startswith("projects/") or not prefix.endswith("/"):
            raise InvalidArgumentError(f"prefix: got {prefix!r}, wanted projects/<project>/… with a slash at its end")
        for item in self._client.list(prefix):
            owner = artifact_prefix_of(item.key)
            if owner is not None and item.key == owner + MANIFEST_NAME:
                try:
                    yield self.ref(owner)
                except NotFoundError:
                    continue  # deleted meanwhile

    def folders(self, prefix: str, *, after: str = "", limit: int) -> Sequence[str]:
        """At most `limit` names right below `prefix`, such as `projects/p/models/`, in the store's order from behind `after`: of
        artifacts that are published and of such as are being written or deleted."""
        return self._client.folders(prefix, after=after, limit=limit)

    def delete(self, artifact: ArtifactRef | str) -> None:
        """Removes an artifact, manifest first, so that no reader trusts a half that is left. Repeating it is no error."""
        prefix = check_prefix(artifact if isinstance(artifact, str) else artifact.prefix)
        self._client.remove([prefix + MANIFEST_NAME])
        if keys := [item.key for item in self._client.list(prefix)]:
            self._client.remove(keys)

    def sweep(self, *, older_than_s: float = _DAY_S) -> Sequence[str]:
        """Removes what no manifest names and nobody has added to for `older_than_s` seconds; returns the folders removed.

        These are the objects of writers that died and of those that lost the race to publish.
        """
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        removed: list[str] = []
        for folder, items in _by_folder(self._client.list("projects/")).items():
            if max(item.modified_at for item in items) >= before or self._names_folder(folder):
                continue
            self._client.remove([item.key for item in items])
            removed.append(folder)
        probes = [item.key for item in self._client.list(_PROBE_PREFIX) if item.modified_at < before]
        if probes:
            self._client.remove(probes)
        self._client.abort_stale_multiparts("projects/", before=before)
        return removed

    def _names_folder(self, folder: str) -> bool:
        prefix, _, tail = folder.rpartition("objects/")
        try:
            return self.manifest(prefix).folder == f"objects/{tail}"
        except NotFoundError:
            return False
        except DataLossError:
            # What a damaged manifest named is for whoever restores it, and no reason to sweep nothing else.
            return True

    def _entry(self, artifact: ArtifactRef | str, name: str) -> tuple[str, Manifest, ObjectEntry]:
        manifest = self.manifest(artifact)
        prefix = artifact if isinstance(artifact, str) else artifact.prefix
        entry = manifest.entry(name)
        if entry is None:
            known = ", ".join(entry.name for entry in manifest.objects[:10]) or "nothing"
            raise NotFoundError(f"{prefix} has no object {name!r}; it has {known}")
        return prefix, manifest, entry

    def _open_entry(self, prefix: str, manifest: Manifest, entry: ObjectEntry, *, offset: int = 0) -> ObjectReader:
        return ObjectReader(self._client, key=prefix + manifest.folder + entry.name, entry=entry, offset=offset)


def _by_folder(items: Iterator[StoredObject]) -> dict[str, list[StoredObject]]:
    """Objects by their writer's folder; manifests and foreign keys are left out."""
    folders: dict[str, list[StoredObject]] = {}
    for item in items:
        owner = artifact_prefix_of(item.key)
        if owner is not None and item.key != owner + MANIFEST_NAME:
            writer_id = item.key.removeprefix(owner).split("/")[1]
            folders.setdefault(f"{owner}objects/{writer_id}/", []).append(item)
    return folders
