"""Local copies of artifacts, content-addressed: `<cache>/<manifest sha256>/<object names>`.

A folder appears under its final name only when every digest was checked and the bytes are on disk. A lock per digest keeps
processes from staging the same artifact twice; the lock dies with its holder, so what a killed one staged is thrown away.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finery_common.artifacts.manifest import Manifest, ObjectEntry
from finery_common.artifacts.reader import ObjectReader
from finery_common.errors import ResourceExhaustedError

_COPY_BYTES = 1 << 20
_SPARE_BYTES = 16 << 20


def cached(cache_dir: Path, *, manifest_sha256: str) -> Path | None:
    """The finished copy, if there is one."""
    folder = cache_dir / manifest_sha256
    return folder if folder.is_dir() else None


def stage(manifest: Manifest, *, cache_dir: Path, open_object: Callable[[ObjectEntry], ObjectReader]) -> Path:
    """Copies an artifact into the cache, or waits for whoever is at it; returns its folder.

    Raises DataLossError for bytes that differ from the manifest and ResourceExhaustedError for a full disk.
    """
    digest = manifest.sha256
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir / f".{digest}.lock"):
        if folder := cached(cache_dir, manifest_sha256=digest):
            return folder
        staging = cache_dir / f".{digest}.staging"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            _check_room(manifest, cache_dir=cache_dir)
            _copy_all(manifest, staging=staging, open_object=open_object)
            staging.rename(cache_dir / digest)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise _no_room(manifest, cache_dir=cache_dir) from error
            raise
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _sync_folder(cache_dir)
    return cache_dir / digest


def remove_unfinished(cache_dir: Path) -> None:
    """Removes what killed processes have left of their staging; what somebody is at stays."""
    digests = {path.name.split(".")[1] for pattern in (".*.staging", ".*.lock") for path in cache_dir.glob(pattern)}
    for digest in digests:
        with _locked(cache_dir / f".{digest}.lock", waits=False) as is_ours:
            if is_ours:
                shutil.rmtree(cache_dir / f".{digest}.staging", ignore_errors=True)


def _copy_all(manifest: Manifest, *, staging: Path, open_object: Callable[[ObjectEntry], ObjectReader]) -> None:
    staging.mkdir()
    for entry in manifest.objects:
        target = staging / entry.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_object(entry) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, _COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
    for folder in [path for path in staging.rglob("*") if path.is_dir()] + [staging]:
        _sync_folder(folder)


def _check_room(manifest: Manifest, *, cache_dir: Path) -> None:
    if shutil.disk_usage(cache_dir).free < manifest.size_bytes + _SPARE_BYTES:
        raise _no_room(manifest, cache_dir=cache_dir)


def _no_room(manifest: Manifest, *, cache_dir: Path) -> ResourceExhaustedError:
    needed_mib, free_mib = (manifest.size_bytes + _SPARE_BYTES) / 2**20, shutil.disk_usage(cache_dir).free / 2**20
    return ResourceExhaustedError(
        f"No room for a local copy of the artifact: {needed_mib:.0f} MiB needed, {free_mib:.0f} MiB free in the cache. "
        "Make room in FINERY_CACHE_DIR, or set it to a larger disk."
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(path: Path, *, waits: bool = True) -> Iterator[bool]:
    """Holds the lock file `path`, which goes at the end; yields False where it is another's and the caller does not wait."""
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not _is_still(path, file.fileno()):
                # Its holder before has removed it, and the next one locks a new file of that name.
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
