"""Brings the replica to what the database wants, again and again: rollouts are run, versions loaded after a restart, leftovers dropped.

Owns the order of work and its tasks. One agent reconciles one replica. Leaves each single piece of work to `rollout` and `residency`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence

import structlog

from finery_common.errors import FineryError
from finery_serving.aliases import Alias, AliasStore, Rollout, RolloutState, Served
from finery_serving.changes import Changes
from finery_serving.metrics import ADAPTER_STATE, ADAPTER_STATES
from finery_serving.residency import Residency
from finery_serving.rollout import RolloutRunner
from finery_serving.staging import Staging

_INTERVAL_S = 30.0
_RETRY_S = 1.0
_PIN_WAIT_S = 60.0

log = structlog.get_logger(__name__)


class Reconciler:
    """`run()` reconciles at every change and every 30 s until cancelled."""

    def __init__(
        self,
        store: AliasStore,
        *,
        runner: RolloutRunner,
        residency: Residency,
        staging: Staging,
        changes: Changes,
        replica_id: str,
        max_resident: int,
    ) -> None:
        self._store = store
        self._runner = runner
        self._residency = residency
        self._staging = staging
        self._changes = changes
        self._replica_id = replica_id
        self._max_resident = max_resident
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # The start of vLLM for which everything was loaded again.
        self._generation = 0
        # The versions of pinned aliases at the last pass.
        self._kept: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Reconciles until cancelled; what fails is tried again."""
        try:
            while True:
                seen = self._changes.count
                try:
                    await self._pass()
                    await self._changes.wait_after(seen, timeout_s=_INTERVAL_S)
                except FineryError as error:
                    log.warning("reconciling failed; trying again", reason=error.message)
                    await asyncio.sleep(_RETRY_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _pass(self) -> None:
        # In this order: a rollout that ends in between is counted, and one that comes later is not begun before the next pass.
        rollouts = await self._store.active_rollouts()
        aliases = await self._store.desired()
        self._publish(aliases)
        kept = frozenset(alias.version for alias in aliases if alias.pinned)
        self._residency.keep(kept)
        for rollout in rollouts:
            self._continue(rollout)
        if not self._residency.ready:
            return
        self._spawn_loads(aliases, kept=kept)
        wanted = _versions(aliases) | {rollout.version for rollout in rollouts}
        for version in self._residency.versions:
            if version not in wanted:
                self._spawn(f"drop {version}", self._residency.drop(version))
        await self._sweep(aliases, rollouts)

    def _spawn_loads(self, aliases: Sequence[Alias], *, kept: frozenset[str]) -> None:
        """Loads what was pinned since the last pass, and after a start of vLLM everything that there is room for."""
        is_new = self._generation != self._residency.generation
        known = frozenset[str]() if is_new else self._kept
        self._generation, self._kept = self._residency.generation, kept
        for number, served in enumerate(_distinct(aliases)):
            if served.version in kept - known:
                self._spawn(f"load {served.version}", self._load(served, wait_s=_PIN_WAIT_S))
            elif is_new and number < self._max_resident:
                self._spawn(f"load {served.version}", self._load(served))

    def _continue(self, rollout: Rollout) -> None:
        """Begins the rollout, unless an earlier one of its alias is at work; each end is a change, which brings the next one's turn."""
        if rollout.state == RolloutState.DRAINING:
            self._spawn(f"drain {rollout.number}", self._drain(rollout))
        else:
            self._spawn(f"alias {rollout.project} {rollout.alias}", self._runner.run(rollout))

    async def _drain(self, rollout: Rollout) -> None:
        """Drains what `rollout` replaced, beside the next rollout of the alias; the rollout is READY when that is done.

        A vLLM that was started since holds nothing of it.
        """
        still_wanted = _versions(await self._store.desired())
        still_wanted |= {other.version for other in await self._store.active_rollouts() if other.state.is_before_flip}
        if rollout.replaced and rollout.replaced not in still_wanted:
            await self._residency.drop(rollout.replaced)
        await self._store.finish(rollout)

    async def _load(self, served: Served, *, wait_s: float = 0.0) -> None:
        path = await self._staging.fetch(served.adapter)
        await self._residency.ensure(served.version, path=path, deadline_s=time.monotonic() + wait_s)

    async def _sweep(self, aliases: Sequence[Alias], rollouts: Sequence[Rollout]) -> None:
        """Removes copies that nothing wants, once vLLM has let go of them."""
        keep = {served.adapter.manifest_sha256 for alias in aliases for served in alias.serving}
        keep |= {rollout.adapter.manifest_sha256 for rollout in rollouts}
        keep |= {path.name for path in self._residency.paths}
        await self._staging.sweep(keep=keep)

    def _publish(self, aliases: Sequence[Alias]) -> None:
        ADAPTER_STATE.clear()
        names = {served.version: alias.alias for alias in aliases for served in alias.serving}
        for version in {*names, *self._residency.versions}:
            state = ADAPTER_STATES.index(self._residency.state_of(version))
            ADAPTER_STATE.labels(names.get(version, ""), version, self._replica_id).set(state)

    def _spawn(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Runs `work` unless the work of that name is still running."""
        if name in self._tasks:
            work.close()
            return
        self._tasks[name] = asyncio.create_task(self._guarded(name, work))

    async def _guarded(self, name: str, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except FineryError as error:
            log.warning("work failed; the next pass sees to it", work=name, reason=error.message)
        finally:
            del self._tasks[name]
            self._changes.notify()


def _distinct(aliases: Sequence[Alias]) -> list[Served]:
    """Each version once: those that are pinned, then in order, each alias' canary after its version."""
    by_need = sorted(aliases, key=lambda alias: not alias.pinned)
    found: dict[str, Served] = {}
    for served in (served for alias in by_need for served in alias.serving):
        found.setdefault(served.version, served)
    return list(found.values())


def _versions(aliases: Sequence[Alias]) -> set[str]:
    return {served.version for alias in aliases for served in alias.serving}
