"""What a job would need: the engine's estimate for a spec, and which of this machine's GPUs it fits on.

Owns asking for it without loading or creating anything. The numbers are `engine.estimate`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finery_common.artifacts import ArtifactStore
from finery_common.catalogue import Catalogue, read_config
from finery_common.errors import InvalidArgumentError
from finery_common.spec import TrainingSpec
from finery_trainer.devices import Gpu
from finery_trainer.requests import check_sequence_length

if TYPE_CHECKING:
    from finery_trainer.engine.estimate import Estimate


@dataclass(frozen=True, kw_only=True)
class ResourceEstimate:
    """`parts` for the GPU with the most memory free; `fitting` has an item for each of `gpus`."""

    parts: Estimate
    gpus: tuple[Gpu, ...]
    fitting: tuple[bool, ...]
    fits: bool | None
    """Into the memory that was asked about; None where no one asked."""


class ResourceEstimates:
    """Answers for the models of `catalogue`. `gpus` lists the GPUs that workers may use, and may block."""

    def __init__(self, *, catalogue: Catalogue, cache_dir: Path, artifacts: ArtifactStore, gpus: Callable[[], Sequence[Gpu]]) -> None:
        self._catalogue = catalogue
        self._cache_dir = cache_dir
        self._artifacts = artifacts
        self._gpus = gpus

    async def estimate(self, spec: TrainingSpec, *, device_memory_bytes: int | None) -> ResourceEstimate:
        """What a run of `spec` needs, for a GPU with `device_memory_bytes` free, or for those that are there.

        Raises as reading the catalogue and the engine's `estimate` do, InvalidArgumentError for memory or rows that cannot be.
        """
        if device_memory_bytes is not None and device_memory_bytes < 1:
            raise InvalidArgumentError(f"device_memory_bytes: got {device_memory_bytes}, wanted at least 1", param="device_memory_bytes")
        entry = self._catalogue.get(spec.base_model)
        check_sequence_length(spec, entry)
        config = await asyncio.to_thread(read_config, entry, cache_dir=self._cache_dir, store=self._artifacts)
        gpus = tuple(await asyncio.to_thread(self._gpus))
        return await asyncio.to_thread(_estimated, spec, config, gpus, device_memory_bytes)


def _estimated(spec: TrainingSpec, config: Mapping[str, object], gpus: tuple[Gpu, ...], asked_bytes: int | None) -> ResourceEstimate:
    from finery_trainer.engine.estimate import allocatable_bytes, estimate
    from finery_trainer.engine.passes import host_bytes

    pinned_bytes = host_bytes(spec)

    def of(free_bytes: int) -> Estimate:
        return estimate(spec, config, device_memory_bytes=free_bytes, host_bytes=pinned_bytes)

    def fits(free_bytes: int) -> bool:
        return of(free_bytes).total_bytes <= allocatable_bytes(spec, free_bytes)

    return ResourceEstimate(
        parts=of(max((gpu.free_bytes for gpu in gpus), default=0) if asked_bytes is None else asked_bytes),
        gpus=gpus,
        fitting=tuple(fits(gpu.free_bytes) for gpu in gpus),
        fits=None if asked_bytes is None else fits(asked_bytes),
    )
