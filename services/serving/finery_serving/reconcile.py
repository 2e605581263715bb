"""Brings the replica to what the database wants, again and again: rollouts are run, versions loaded after a restart, leftovers dropped.

Owns the order of work and its tasks. One agent reconciles one replica. Leaves each single piece of work to `rollout` and `residency`, and
which replica is to hold what to `placement`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass

import structlog

from finery_common.errors import FineryError
from finery_serving.aliases import AliasStore
from finery_serving.changes import Changes
from finery_serving.metrics import ADAPTER_STATE, ADAPTER_STATES
from finery_serving.placement import Placement
from finery_serving.records import Alias, Rollout, RolloutState, Served
from finery_serving.registry import Registry
from finery_serving.residency import Residency
from finery_serving.rollout import RolloutRunner
from finery_serving.staging import Staging

_INTERVAL_S = 30.0
_RETRY_S = 1.0
_MAX_PAUSE_S, _PAUSE_FORGOTTEN_S = 5.0, 60.0
_PIN_WAIT_S = 60.0
_ASKED_WAIT_S = 30.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Pause:
    """For how long work is left alone after a failure, and until when."""

    length_s: float
    until_s: float


_NO_PAUSE = _Pause(_RETRY_S / 2, 0.0)


class Reconciler:
    """`run()` reconciles at every change and every 30 s until cancelled."""

    def __init__(
        self,
        store: AliasStore,
        *,
        runner: RolloutRunner,
        residency: Residency,
        registry: Registry,
        placement: Placement,
        staging: Staging,
        changes: Changes,
    ) -> None:
        self._store = store
        self._runner = runner
        self._residency = residency
        self._staging = staging
        self._registry = registry
        self._placement = placement
        self._changes = changes
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # The start of vLLM for which everything was loaded again.
        self._generation = 0
        # What was to be here at the last pass.
        self._placed: frozenset[str] = frozenset()
        # Of work that has failed, by name.
        self._pauses: dict[str, _Pause] = {}
        # When vLLM is next asked what it holds.
        self._compared_after_s = 0.0
        # What is still to be loaded here, and when it is tried next.
        self._owed_s: dict[str, float] = {}

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
                except Exception:
                    # vLLM needs no database: it outlives whatever one may answer.
                    log.exception("reconciling failed as nobody expected; trying again")
                    await asyncio.sleep(_RETRY_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _pass(self) -> None:
        now = await self._store.snapshot()
        rollouts = now.rollouts
        aliases = [alias for alias in now.desired if alias.base_model == self._registry.base_model]
        self._publish(aliases)
        self._residency.keep([alias.version for alias in aliases if alias.pinned])
        for rollout in rollouts:
            await self._give_up_without_pool(rollout)
        for rollout in _due(rollouts, base_model=self._registry.base_model):
            self._continue(rollout)
        if not self._residency.ready:
            return
        self._spawn_loads(aliases, placed=self._placement.of(now.desired, rollouts))
        for version, adapter in self._registry.loads_asked.items():
            self._spawn(f"load {version}", self._load_as_asked(Served(version, "", adapter, self._registry.base_model)))
        wanted = _versions(aliases) | {rollout.version for rollout in rollouts}
        self._residency.forget_failures(but_of=wanted)
        for version in self._residency.versions:
            if version not in wanted:
                self._spawn(f"drop {version}", self._residency.drop(version))
        if time.monotonic() >= self._compared_after_s:
            # Its end is a change, which brings a pass.
            self._compared_after_s = time.monotonic() + _INTERVAL_S
            self._spawn("compare with vLLM", self._residency.reconcile())
        await self._sweep(aliases, rollouts)

    def _spawn_loads(self, aliases: Sequence[Alias], *, placed: Mapping[str, Sequence[str]]) -> None:
        """Loads what is placed here since the last pass, and after a start of vLLM everything that is, each until it has been loaded once;
        a pinned version whenever it is not.

        What had to make room since comes back when it is asked for.
        """
        own = self._registry.own.id
        here = frozenset(version for version, replicas in placed.items() if own in replicas)
        if self._generation != self._residency.generation:
            self._generation, self._placed, self._owed_s = self._residency.generation, frozenset(), {}
        known, self._placed = self._placed, here
        self._owed_s = {version: at_s for version, at_s in self._owed_s.items() if version in here}
        for served, is_pinned in _distinct(aliases).values():
            version = served.version
            if self._residency.state_of(version) == "loaded":
                self._owed_s.pop(version, None)
                continue
            is_owed = version in here and (is_pinned or version not in known or version in self._owed_s)
            if is_owed and self._owed_s.get(version, 0.0) <= time.monotonic():
                self._owed_s[version] = time.monotonic() + _INTERVAL_S
                self._spawn(f"load {version}", self._load(served, wait_s=_PIN_WAIT_S if is_pinned else 0.0))

    async def _give_up_without_pool(self, rollout: Rollout) -> None:
        """Fails a rollout whose base model nobody serves any more: no agent works at it, and the alias' next one waits for it."""
        served = self._registry.pools
        if not self._registry.has_looked or not rollout.state.is_before_flip or rollout.base_model in served:
            return
        message = f"{rollout.version} was trained on {rollout.base_model!r}, which is served no more; served are: {', '.join(served)}."
        await self._store.finish(rollout, error={"code": "base_model_not_served", "message": message, "param": "adapter"})

    def _continue(self, rollout: Rollout) -> None:
        """Begins the rollout, unless an earlier one of its alias is at work; each end is a change, which brings the next one's turn."""
        if rollout.state == RolloutState.DRAINING:
            self._spawn(f"drain {rollout.number}", self._drain(rollout))
        else:
            self._spawn(f"alias {rollout.project} {rollout.alias}", self._runner.run(rollout))

    async def _drain(self, rollout: Rollout) -> None:
        """Drains what `rollout` replaced, beside the next rollout of the alias; the rollout is READY when that is done on every replica,
        whichever base model it is of.

        A vLLM that was started since holds nothing of it.
        """
        while rollout.replaced and not (await self._store.snapshot()).wants(rollout.replaced):
            if rollout.replaced in self._residency.versions:
                await self._residency.drop(rollout.replaced)
            seen = self._changes.count
            answering = [replica for replica in self._registry.live if replica.is_ready]
            if not any(replica.versions.get(rollout.replaced, "failed") != "failed" for replica in answering):
                break
            await self._changes.wait_after(seen, timeout_s=_INTERVAL_S)
        await self._store.finish(rollout)

    async def _load(self, served: Served, *, wait_s: float = 0.0) -> None:
        path = await self._staging.fetch(served.adapter)
        await self._residency.ensure(served.version, path=path, deadline_s=time.monotonic() + wait_s)

    async def _load_as_asked(self, served: Served) -> None:
        try:
            await self._load(served, wait_s=_ASKED_WAIT_S)
        finally:
            await self._registry.loaded(served.version)

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
            ADAPTER_STATE.labels(names.get(version, ""), version, self._registry.own.id).set(state)

    def _spawn(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Runs `work` unless the work of that name is still running, or has failed a moment ago."""
        if name in self._tasks or time.monotonic() < self._pauses.get(name, _NO_PAUSE).until_s:
            work.close()
            return
        self._tasks[name] = asyncio.create_task(self._guarded(name, work))

    async def _guarded(self, name: str, work: Coroutine[None, None, None]) -> None:
        try:
            await work
            self._pauses.pop(name, None)
        except FineryError as error:
            log.warning("work failed; a later pass sees to it", work=name, reason=error.message)
            self._pause(name)
        except Exception:
            log.exception("work failed as nobody expected", work=name)
            self._pause(name)
        finally:
            del self._tasks[name]
            self._changes.notify()

    def _pause(self, name: str) -> None:
        """Has the next try of that work wait, twice as long each time: each end of work is a change, which brings a pass."""
        now_s = time.monotonic()
        self._pauses = {other: pause for other, pause in self._pauses.items() if pause.until_s > now_s - _PAUSE_FORGOTTEN_S}
        length_s = min(2 * self._pauses.get(name, _NO_PAUSE).length_s, _MAX_PAUSE_S)
        self._pauses[name] = _Pause(length_s, now_s + length_s)
        asyncio.get_running_loop().call_later(length_s, self._changes.notify)


def _due(rollouts: Sequence[Rollout], *, base_model: str) -> list[Rollout]:
    """What is worked at by replicas of `base_model`: what drains, and the first other rollout of each alias where it is theirs.

    The next one of an alias may be another pool's, which sees to the order as well.
    """
    first: dict[tuple[str, str], int] = {}
    for rollout in rollouts:
        if rollout.state.is_before_flip:
            first.setdefault((rollout.project, rollout.alias), rollout.number)
    own = {rollout.number for rollout in rollouts if rollout.base_model == base_model} & set(first.values())
    return [rollout for rollout in rollouts if rollout.state == RolloutState.DRAINING or rollout.number in own]


def _distinct(aliases: Sequence[Alias]) -> dict[str, tuple[Served, bool]]:
    """Each version once, and whether it is pinned: those that are first, then in order, each alias' canary after its version."""
    by_need = sorted(aliases, key=lambda alias: not alias.pinned)
    found: dict[str, tuple[Served, bool]] = {}
    for alias in by_need:
        for served in alias.serving:
            found.setdefault(served.version, (served, alias.pinned and served.version == alias.version))
    return found


def _versions(aliases: Sequence[Alias]) -> set[str]:
    return {served.version for alias in aliases for served in alias.serving}
