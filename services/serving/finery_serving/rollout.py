"""How a version takes an alias over: stage, verify, preflight, load, probe on every replica that is to have it, then the flip. A canary
takes a share only.

The agent of each replica runs every rollout: it prepares its own replica, and the one that leads flips the alias once all are prepared.
Every step may be repeated, so a rollout that a crash cut short starts again from the first. Leaves when rollouts run, and in which
order, to `reconcile`, and draining and unloading, the last two, too: they go on beside the alias's next rollout.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import structlog

from finery_common.errors import AbortedError, FailedPreconditionError, FineryError, UnavailableError
from finery_common.rpc.status import unknown_error
from finery_common.tracing import span
from finery_serving.aliases import AliasStore
from finery_serving.changes import Changes
from finery_serving.metrics import SWAP_SECONDS, SWAPS
from finery_serving.placement import Placement
from finery_serving.preflight import BaseModel, check_adapter, check_manifest
from finery_serving.records import Alias, Rollout, RolloutState
from finery_serving.registry import Registry
from finery_serving.residency import Residency
from finery_serving.staging import Staging
from finery_serving.vllm_client import VllmClient

_MAX_ATTEMPTS = 5
_FIRST_PAUSE_S = 1.0
_LOAD_WAIT_S = 60.0
_LOOK_AGAIN_S = 1.0

log = structlog.get_logger(__name__)


@dataclass
class _Work:
    """What the steps of a rollout hand on."""

    rollout: Rollout
    before: Alias
    """The alias as it was when the work began; flipping compares with it."""
    path: Path | None = None
    staged_at_s: float | None = None
    """When the latest attempt here had the files; the swap is measured from then. None: others had them."""
    attempts: int = 0
    reached: RolloutState = RolloutState.PENDING

    @property
    def swap_s(self) -> float | None:
        """Seconds since then."""
        return None if self.staged_at_s is None else time.monotonic() - self.staged_at_s


class RolloutRunner:
    """Carries rollouts out, one call each."""

    def __init__(
        self,
        store: AliasStore,
        *,
        staging: Staging,
        residency: Residency,
        registry: Registry,
        placement: Placement,
        client: VllmClient,
        base: BaseModel,
        max_lora_rank: int,
        changes: Changes,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._store = store
        self._staging = staging
        self._residency = residency
        self._registry = registry
        self._placement = placement
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
        )

    async def run(self, rollout: Rollout) -> None:
        """Takes `rollout` to its flip or its share, or to FAILED with the reason while what served goes on.

        What is gone for the moment is tried again, vLLM's own start without limit. Raises only what the database raises.
        """
        work = _Work(rollout, before=await self._store.get(rollout.project, rollout.alias))
        try:
            with self._residency.pinned(rollout.version):
                while not await self._turn(work):
                    pass
        finally:
            self._registry.failures.pop(rollout.number, None)

    async def _turn(self, work: _Work) -> bool:
        """Looks at where the rollout is and does what can be done; waits for a change where that is nothing. True when it is over."""
        seen, rollout = self._changes.count, work.rollout
        now = await self._store.snapshot()
        if not any(other.number == rollout.number and other.state.is_before_flip for other in now.rollouts):
            return True
        placed = self._placement.of(now.desired, now.rollouts).get(rollout.version, ())
        if self._registry.own.id in placed and self._has_work(rollout):
            await self._prepare(work)
        elif self._registry.leads and placed and await self._end(work, placed):
            return True
        else:
            await self._changes.wait_after(seen, timeout_s=_LOOK_AGAIN_S)
        return False

    def _has_work(self, rollout: Rollout) -> bool:
        return not self._residency.has_answered(rollout.version) and rollout.number not in self._registry.failures

    async def _prepare(self, work: _Work) -> None:
        """This replica's steps; why they fail for good is told to all."""
        rollout = work.rollout
        try:
            for name, state, step in self._steps:
                noted = asyncio.create_task(self._advance(work, state))
                if state == RolloutState.STAGING:
                    await noted
                log.info("rollout", step=name, alias=rollout.alias, version=rollout.version)
                # Below the request that asked for it; without one it is no trace's part.
                traced = span(f"rollout: {name}", parent=rollout.traceparent, version=rollout.version)
                try:
                    with traced if rollout.traceparent else nullcontext():
                        await step(work)
                except BaseException:
                    await asyncio.gather(noted, return_exceptions=True)
                    raise
                # From loading on the disk is waited for beside the step: what has ended meanwhile stops after it.
                await noted
            self._changes.notify()
        except AbortedError:
            # Ended meanwhile, which the next look sees.
            return
        except UnavailableError as error:
            work.attempts += 1
            if work.attempts == _MAX_ATTEMPTS:
                self._give_up(rollout, error)
                return
            pause_s = self._first_pause_s * 2 ** (work.attempts - 1)
            log.warning("rollout waits", version=rollout.version, reason=error.message, attempt=work.attempts, pause_s=pause_s)
            await asyncio.sleep(pause_s)
        except FineryError as error:
            self._give_up(rollout, error)
        except Exception as error:  # noqa: BLE001 - a bug must end this rollout, not all of them
            self._give_up(rollout, unknown_error(error))

    def _give_up(self, rollout: Rollout, error: FineryError) -> None:
        self._registry.failures[rollout.number] = {"code": error.code, "message": error.message, "param": error.param}
        self._changes.notify()

    async def _advance(self, work: _Work, state: RolloutState) -> None:
        """What people see is the state of the replica whose agent leads."""
        if state != work.reached and self._registry.leads:
            await self._store.advance(work.rollout, state)
            work.reached = state

    async def _end(self, work: _Work, placed: Collection[str]) -> bool:
        """Flips where all of `placed`, ids of replicas, are prepared, fails where one cannot be; answers whether either was done."""
        rollout = work.rollout
        replicas = [replica for replica in self._registry.ready if replica.id in placed]
        failure = next((replica.failures[rollout.number] for replica in replicas if rollout.number in replica.failures), None)
        if failure is not None:
            await self._fail(rollout, failure)
            return True
        if not replicas or not all(rollout.version in replica.answering for replica in replicas):
            if work.reached == RolloutState.PENDING:
                await self._advance(work, RolloutState.LOADING)
            return False
        try:
            await self._flip(work)
        except (AbortedError, FailedPreconditionError) as error:
            await self._fail(rollout, {"code": error.code, "message": error.message, "param": error.param})
        return True

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
        self._residency.note_probe(work.rollout.version)

    async def _flip(self, work: _Work) -> None:
        rollout, before = work.rollout, work.before
        if rollout.canary_weight:
            await self._store.start_canary(rollout, epoch=before.epoch, swap_s=work.swap_s)
            SWAPS.labels("canary").inc()
            log.info("canary started", alias=rollout.alias, version=rollout.version, weight=rollout.canary_weight, beside=before.version)
            return
        await self._store.flip(rollout, epoch=before.epoch, swap_s=work.swap_s)
        if (swap_s := work.swap_s) is not None:
            SWAP_SECONDS.observe(swap_s)
        SWAPS.labels("flipped").inc()
        log.info("alias flipped", alias=rollout.alias, version=rollout.version, replaced=before.version, swap_s=swap_s and round(swap_s, 3))

    async def _fail(self, rollout: Rollout, error: Mapping[str, object]) -> None:
        """Not so where it is over: flipped, of which the reconciler had not heard, or ended by somebody."""
        if await self._store.finish(rollout, error=error):
            SWAPS.labels("failed").inc()
            log.warning("rollout failed", alias=rollout.alias, version=rollout.version, code=error["code"], reason=error["message"])
