"""Local copies of adapters for vLLM, content-addressed and never rewritten.

Owns a cache folder of its own, so that no other service's copy is ever removed, and its sweeping. Leaves when a copy may go to `reconcile`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from finery_common.artifacts import ArtifactRef, ArtifactStore, Manifest, remove_unfinished
from finery_serving.metrics import STAGE_SECONDS
from finery_serving.preflight import check_sizes

_COPY = re.compile(r"[0-9a-f]{64}")


class Staging:
    """Copies under `folder`, each `<folder>/<manifest sha256>/`, with every digest checked on the way in."""

    def __init__(self, store: ArtifactStore, *, folder: Path) -> None:
        self.folder = folder
        self._store = store

    async def manifest(self, adapter: ArtifactRef) -> Manifest:
        """The adapter's manifest, raising as `ArtifactStore.manifest` does."""
        return await asyncio.to_thread(self._store.manifest, adapter)

    async def fetch(self, adapter: ArtifactRef) -> Path:
        """The folder of the copy, made where it is missing, raising as `ArtifactStore.fetch` and `check_sizes` do."""
        started_s = time.perf_counter()
        folder = await asyncio.to_thread(self._store.fetch, adapter, self.folder, check=check_sizes)
        STAGE_SECONDS.observe(time.perf_counter() - started_s)
        return folder

    async def sweep(self, *, keep: Collection[str]) -> None:
        """Removes every copy whose manifest's digest is not in `keep`, and what a killed agent had not finished.

        The caller knows that vLLM has none of them.
        """
        await asyncio.to_thread(self._sweep, frozenset(keep))

    def _sweep(self, keep: frozenset[str]) -> None:
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if _COPY.fullmatch(path.name) and path.name not in keep:
                # A name that no reader takes for a copy, so that a removal cut short leaves no half.
                removed = self.folder / f".{path.name}.removed"
                _remove(removed)  # what a removal cut short has left
                path.rename(removed)
                _remove(removed)
            elif path.name.endswith(".removed"):
                _remove(path)
        remove_unfinished(self.folder)


def _remove(folder: Path) -> None:
    # Listed before, it may be gone by now.
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
