"""How a version takes an alias over: stage, verify, preflight, load, probe, flip, as a list of named steps. A canary takes a share only.

Every step may be repeated, so a rollout that a crash cut short starts again from the first. Leaves when rollouts run, and in which
order, to `reconcile`, and draining and unloading, the last two, too: they go on beside the alias's next rollout.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from finery_common.errors import FineryError, UnavailableError
from finery_common.rpc.status import unknown_error
from finery_serving.aliases import Alias, AliasStore, Rollout, RolloutState
from finery_serving.changes import Changes
from finery_serving.metrics import SWAP_SECONDS, SWAPS
from finery_serving.preflight import BaseModel, check_adapter, check_manifest
from finery_serving.residency import Residency
from finery_serving.staging import Staging
from finery_serving.vllm_client import VllmClient

_MAX_ATTEMPTS = 5
_FIRST_PAUSE_S = 1.0
_LOAD_WAIT_S = 60.0

log = structlog.get_logger(__name__)


@dataclass
class _Work:
    """What the steps of one attempt hand on."""

    rollout: Rollout
    before: Alias
    """The alias as it was when the attempt began; flipping compares with it."""
    path: Path | None = None
    staged_at_s: float = 0.0


class RolloutRunner:
    """Carries rollouts out, one call each."""

    def __init__(
        self,
        store: AliasStore,
        *,
        staging: Staging,
        residency: Residency,
        client: VllmClient,
        base: BaseModel,
        max_lora_rank: int,
        changes: Changes,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._store = store
        self._staging = staging
        self._residency = residency
        self._client = client
        self._base = base
        self._max_lora_rank = max_lora_rank
        self._changes = changes
        self._first_pause_s = first_pause_s
        self._steps: Sequence[tuple[str, RolloutState, Callable[[_Work], Awaitable[None]]]] = (
            ("stage", RolloutState.STAGING, self._stage),
            ("verify", RolloutState.STAGING, self._verify),
            ("preflight", RolloutState.STAGING, self._preflight),
            ("load", RolloutState.LOADING, self._load),
            ("probe", RolloutState.PROBING, self._probe),
            ("flip", RolloutState.PROBING, self._flip),
        )

    async def run(self, rollout: Rollout) -> None:
        """Takes `rollout` to its flip or its share, or to FAILED with the reason while what served goes on.

        What is gone for the moment is tried again, vLLM's own start without limit. Raises only what the database raises.
        """
        try:
            await self._with_retries(rollout)
        except FineryError as error:
            await self._fail(rollout, error)
        except Exception as error:  # noqa: BLE001 - a bug must end this rollout, not all of them
            await self._fail(rollout, unknown_error(error))

    async def _with_retries(self, rollout: Rollout) -> None:
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            await self._wait_ready()
            try:
                await self._attempt(rollout)
                return
            except UnavailableError as error:
                if attempt == _MAX_ATTEMPTS:
                    raise
                pause_s = self._first_pause_s * 2 ** (attempt - 1)
                log.warning("rollout waits", version=rollout.version, reason=error.message, attempt=attempt, pause_s=pause_s)
                await asyncio.sleep(pause_s)

    async def _attempt(self, rollout: Rollout) -> None:
        work = _Work(rollout, before=await self._store.get(rollout.project, rollout.alias))
        with self._residency.pinned(rollout.version):
            reached = RolloutState.PENDING
            for name, state, step in self._steps:
                if state != reached:
                    await self._store.advance(rollout, state)
                    reached = state
                log.info("rollout", step=name, alias=rollout.alias, version=rollout.version)
                await step(work)

    async def _stage(self, work: _Work) -> None:
        work.path = await self._staging.fetch(work.rollout.adapter)
        work.staged_at_s = time.monotonic()

    async def _verify(self, work: _Work) -> None:
        check_manifest(await self._staging.manifest(work.rollout.adapter), base=self._base)

    async def _preflight(self, work: _Work) -> None:
        assert work.path is not None
        await asyncio.to_thread(check_adapter, work.path, base=self._base, max_lora_rank=self._max_lora_rank)

    async def _load(self, work: _Work) -> None:
        assert work.path is not None
        await self._residency.ensure(work.rollout.version, path=work.path, deadline_s=time.monotonic() + _LOAD_WAIT_S)

    async def _probe(self, work: _Work) -> None:
        await self._client.probe(work.rollout.version, alias=work.rollout.alias)

    async def _flip(self, work: _Work) -> None:
        rollout, before = work.rollout, work.before
        swap_s = time.monotonic() - work.staged_at_s
        if rollout.canary_weight:
            await self._store.start_canary(rollout, etag=before.etag, swap_s=swap_s)
            SWAPS.labels("canary").inc()
            log.info("canary started", alias=rollout.alias, version=rollout.version, weight=rollout.canary_weight, beside=before.version)
            return
        await self._store.flip(rollout, etag=before.etag, swap_s=swap_s)
        SWAP_SECONDS.observe(swap_s)
        SWAPS.labels("flipped").inc()
        log.info("alias flipped", alias=rollout.alias, version=rollout.version, replaced=before.version, swap_s=round(swap_s, 3))

    async def _wait_ready(self) -> None:
        while not self._residency.ready:
            await self._changes.wait_after(self._changes.count)

    async def _fail(self, rollout: Rollout, error: FineryError) -> None:
        """Not so where it is over: flipped, of which the reconciler had not heard, or ended by somebody."""
        if await self._store.finish(rollout, error={"code": error.code, "message": error.message, "param": error.param}):
            SWAPS.labels("failed").inc()
            log.warning("rollout failed", alias=rollout.alias, version=rollout.version, code=error.code, reason=error.message)
