"""Where a request for a model goes.

Owns waiting: for a rollout that is under way, for vLLM to start, for cold versions to load. The gateway asks, keeps the answer, splits
requests over its targets and their replicas by itself, sends each to a replica as `middleware/finery_vllm_middleware.py` says, and asks
again when the replica answers 409 with `x-finery-retired`, 401, or not at all before the first byte. Repeat such a request with the
new route, at another replica where there is one. Ask without `after_epoch` then: a version may be gone because it had to make room, and
the answer brings the same one back under the same epoch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from finery_common.errors import FailedPreconditionError, FineryError, NotFoundError, ResourceExhaustedError, UnavailableError
from finery_serving.aliases import AliasStore
from finery_serving.changes import Changes
from finery_serving.placement import Placement
from finery_serving.records import Alias, RolloutState, Served
from finery_serving.registry import Registry, Replica
from finery_serving.residency import Residency
from finery_serving.staging import Staging
from finery_serving.vllm_client import RETRY_AFTER_S, VllmClient

# Left of the caller's deadline, so that it gets our reason and not its own timeout.
_MARGIN_S = 0.25
_LOOK_AGAIN_S = 1.0
_CANARY_WAIT_S = 1.0
_ASK_AGAIN_S = 2.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Target:
    """A version, its percent of the requests, and the replicas that let requests for it in, each with its address and token."""

    version: str
    weight: int
    replicas: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Route:
    """What requests for a model are split over, what serves first; `epoch` is 0 for a base model, `max_model_len` is in tokens."""

    targets: tuple[Target, ...]
    epoch: int
    base_model: str
    max_model_len: int

    @property
    def version(self) -> str:
        """What serves."""
        return self.targets[0].version


class Routes:
    """Resolves models to routes."""

    def __init__(
        self,
        store: AliasStore,
        *,
        residency: Residency,
        registry: Registry,
        staging: Staging,
        client: VllmClient,
        changes: Changes,
    ) -> None:
        self._store = store
        self._residency = residency
        self._registry = registry
        self._staging = staging
        self._client = client
        self._changes = changes
        # Canaries on their way to be loaded.
        self._warming: dict[str, asyncio.Task[None]] = {}

    async def resolve(self, project: str, *, model: str, after_epoch: int, timeout_s: float) -> Route:
        """The route of an alias of `project`, newer than `after_epoch`, or of a base model that is served; whichever replicas they are on.

        Waits up to `timeout_s` for a rollout, for vLLM or for a cold version. Raises NotFoundError where nothing is deployed under that
        name, UnavailableError with `retry_after_s` when the time is over, FailedPreconditionError where a deployed version cannot be
        loaded.
        """
        deadline_s = time.monotonic() + timeout_s - _MARGIN_S
        asked: dict[str, float] = {}
        while True:
            seen = self._changes.count
            reason = f"{model} is being deployed; repeat in {RETRY_AFTER_S:.0f} s."
            try:
                route = await self._look(project, model, after_epoch=after_epoch, deadline_s=deadline_s, asked=asked)
            except UnavailableError as error:
                route, reason = None, error.message
            if route is not None:
                return route
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise UnavailableError(reason, retry_after_s=RETRY_AFTER_S)
            await self._changes.wait_after(seen, timeout_s=min(left_s, _LOOK_AGAIN_S))

    async def _look(self, project: str, model: str, *, after_epoch: int, deadline_s: float, asked: dict[str, float]) -> Route | None:
        """The route, or None while it has to be waited for; `asked` says when which replica was asked to load for it."""
        if model in self._registry.pools:
            ready = await self._answering(model)
            return _route([Target(model, 100, self._addresses(ready))], epoch=0, over=ready)
        alias = await self._store.get(project, model)
        awaits_flip = _awaits_flip(alias, after_epoch=after_epoch)
        ready = await self._answering(alias.base_model)
        if awaits_flip:
            return None
        served, *canaries = alias.serving
        holders = await self._holders(alias, served, ready=ready, deadline_s=deadline_s, asked=asked)
        if not holders:
            return None
        targets, over = [Target(served.version, 100, self._addresses(holders))], list(holders)
        for canary in canaries:
            if holders := await self._canary_holders(alias, canary, ready=ready):
                targets = [replace(targets[0], weight=100 - alias.canary_weight)]
                targets.append(Target(canary.version, alias.canary_weight, self._addresses(holders)))
                over += holders
        return _route(targets, epoch=alias.epoch, over=over)

    async def _answering(self, base_model: str) -> tuple[Replica, ...]:
        """The replicas of `base_model` to send requests to. A killed vLLM takes a moment to be gone: who comes here after it failed must
        not be sent there again. Raises UnavailableError where there is none.
        """
        ready = self._registry.ready_of(base_model)
        own = self._registry.own.id
        if any(replica.id == own for replica in ready) and not await self._client.is_healthy():
            ready = tuple(replica for replica in ready if replica.id != own)
        if not ready:
            is_starting = base_model in self._registry.pools
            reason = "vLLM is starting" if is_starting else f"No vLLM serves {base_model}, its base model, at the moment"
            raise UnavailableError(f"{reason}; repeat in {RETRY_AFTER_S:.0f} s.", retry_after_s=RETRY_AFTER_S)
        return ready

    def _serves(self, replica: Replica, version: str) -> bool:
        """As of now where the replica is this one, whose use of the version is noted by it."""
        return self._residency.serves(version) if replica.id == self._registry.own.id else replica.serves(version)

    async def _holders(
        self, alias: Alias, served: Served, *, ready: Sequence[Replica], deadline_s: float, asked: dict[str, float]
    ) -> list[Replica]:
        """The replicas that let requests for `served` in; where none does, the first that the alias prefers loads it, which another's agent
        is asked for: none for now.
        """
        if holders := [replica for replica in ready if self._serves(replica, served.version)]:
            return holders
        # Where the alias has moved on since it was read, what it served is not let in again: the next look finds what serves now.
        if not (await self._store.snapshot()).wants(served.version):
            return []
        by_id = {replica.id: replica for replica in ready}
        first = by_id[Placement.preferred(alias, by_id)[0]]
        if first.id == self._registry.own.id:
            await self._warm(alias, served, deadline_s=deadline_s)
            return [first]
        # Again after a while: it may have loaded the version and had to make room once more before anybody saw it.
        if time.monotonic() - asked.get(first.id, -_ASK_AGAIN_S) >= _ASK_AGAIN_S:
            asked[first.id] = time.monotonic()
            await self._registry.ask_to_load(first, served.version, adapter=served.adapter)
        return []

    async def _canary_holders(self, alias: Alias, canary: Served, *, ready: Sequence[Replica]) -> list[Replica]:
        """As `_holders`, but one that is not there soon must not keep the version that serves from answering."""
        if not any(self._serves(replica, canary.version) for replica in ready):
            task = self._warming.get(canary.version)
            if task is None:
                task = self._warming[canary.version] = asyncio.create_task(self._try_canary(alias, canary, ready=ready))
                task.add_done_callback(lambda _: self._warming.pop(canary.version))
            await asyncio.wait([task], timeout=_CANARY_WAIT_S)
        return [replica for replica in ready if self._serves(replica, canary.version)]

    async def _try_canary(self, alias: Alias, canary: Served, *, ready: Sequence[Replica]) -> None:
        try:
            await self._holders(alias, canary, ready=ready, deadline_s=time.monotonic(), asked={})
        except FineryError as error:
            log.warning("a canary gets no requests", alias=alias.alias, version=canary.version, reason=error.message)

    async def _warm(self, alias: Alias, served: Served, *, deadline_s: float) -> None:
        try:
            path = await self._staging.fetch(served.adapter)
            await self._residency.ensure(served.version, path=path, deadline_s=deadline_s)
        except UnavailableError:
            raise
        except ResourceExhaustedError as error:
            log.error("no room for a deployed version", alias=alias.alias, version=served.version, reason=error.message)
            message = f"There is no room to load {alias.alias}; the operator finds the reason in serving's log. Repeat later."
            raise UnavailableError(message, retry_after_s=RETRY_AFTER_S) from error
        except FineryError as error:
            # The reason may name files of this machine.
            log.error("a deployed version cannot be loaded", alias=alias.alias, version=served.version, reason=error.message)
            message = f"{alias.alias} is deployed but cannot be loaded; the operator finds the reason in serving's log. Deploy it again."
            raise FailedPreconditionError(message, code="adapter_not_loadable") from error

    def _addresses(self, replicas: Sequence[Replica]) -> tuple[tuple[str, str], ...]:
        return tuple((replica.address, self._registry.token_of(replica)) for replica in replicas)


def _route(targets: Sequence[Target], *, epoch: int, over: Sequence[Replica]) -> Route:
    """`over` are the replicas of all targets, of one base model."""
    lengths = [replica.max_model_len for replica in over if replica.max_model_len]
    return Route(tuple(targets), epoch, over[0].base_model, min(lengths, default=0))


def _awaits_flip(alias: Alias, *, after_epoch: int) -> bool:
    """Whether only a rollout can give the answer. Raises NotFoundError where none is on its way."""
    if alias.version and alias.epoch > after_epoch:
        return False
    if alias.rollout.state.is_before_flip or alias.version:
        return True
    reason = (alias.rollout.error or {}).get("message", "")
    how = "was rolled back" if alias.rollout.state == RolloutState.ROLLED_BACK else "failed"
    raise NotFoundError(f"Nothing is deployed under {alias.alias}: its rollout {how}. {reason}", code="model_not_found", param="model")
