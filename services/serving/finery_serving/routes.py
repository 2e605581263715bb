"""Where a request for a model goes.

Owns waiting: for a rollout that is under way, for vLLM to start, for cold versions to load. The gateway asks, keeps the answer, splits
requests over its targets by itself, sends each to the replica as `middleware/finery_vllm_middleware.py` says, and asks again when the
replica answers 409 with `x-finery-retired`, 401, or not at all before the first byte. Repeat such a request once with the new route. Ask
without `after_epoch` then: a version may be gone because it had to make room, and the answer brings the same one back under the same
epoch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

from finery_common.errors import FailedPreconditionError, FineryError, NotFoundError, UnavailableError
from finery_serving.aliases import Alias, AliasStore, RolloutState, Served
from finery_serving.changes import Changes
from finery_serving.residency import Residency
from finery_serving.staging import Staging
from finery_serving.vllm_client import RETRY_AFTER_S, VllmClient
from finery_serving.vllm_process import VllmProcess

# Left of the caller's deadline, so that it gets our reason and not its own timeout.
_MARGIN_S = 0.25
_LOOK_AGAIN_S = 1.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Route:
    """A replica and the name it knows the version by; `epoch` is 0 for the base model, `max_model_len` is in tokens.

    `targets` are versions with their percent of the requests, `version` first.
    """

    version: str
    targets: tuple[tuple[str, int], ...]
    epoch: int
    replica_address: str
    replica_token: str
    base_model: str
    max_model_len: int


class Routes:
    """Resolves models to routes."""

    def __init__(
        self, store: AliasStore, *, process: VllmProcess, residency: Residency, staging: Staging, client: VllmClient, changes: Changes
    ) -> None:
        self._store = store
        self._process = process
        self._residency = residency
        self._staging = staging
        self._client = client
        self._changes = changes
        self._max_model_len = (0, 0)

    async def resolve(self, project: str, *, model: str, after_epoch: int, timeout_s: float) -> Route:
        """The route of an alias of `project`, newer than `after_epoch`, or of the base model.

        Waits up to `timeout_s` for a rollout, for vLLM or for a cold version. Raises NotFoundError where nothing is deployed under that
        name, UnavailableError with `retry_after_s` when the time is over, FailedPreconditionError where a deployed version cannot be
        loaded.
        """
        deadline_s = time.monotonic() + timeout_s - _MARGIN_S
        while True:
            seen = self._changes.count
            reason = f"{model} is being deployed; repeat in {RETRY_AFTER_S:.0f} s."
            try:
                route = await self._look(project, model, after_epoch=after_epoch, deadline_s=deadline_s)
            except UnavailableError as error:
                route, reason = None, error.message
            # A killed vLLM takes a moment to be gone: who comes here after it failed must not be sent there again.
            if route is not None and await self._client.is_healthy():
                return route
            if not self._process.ready:
                reason = f"vLLM is starting; repeat in {RETRY_AFTER_S:.0f} s."
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise UnavailableError(reason, retry_after_s=RETRY_AFTER_S)
            await self._changes.wait_after(seen, timeout_s=min(left_s, _LOOK_AGAIN_S))

    async def _look(self, project: str, model: str, *, after_epoch: int, deadline_s: float) -> Route | None:
        """The route, or None while it has to be waited for."""
        if model == self._process.config.base_model:
            return await self._route(((model, 100),), epoch=0) if self._process.ready else None
        alias = await self._store.get(project, model)
        if _awaits_flip(alias, after_epoch=after_epoch) or not self._process.ready:
            return None
        return await self._alias_route(alias, deadline_s=deadline_s)

    async def _alias_route(self, alias: Alias, *, deadline_s: float) -> Route:
        served, *canary = alias.serving
        with self._residency.pinned(served.version):
            await self._warm(alias, served, deadline_s=deadline_s)
            weight = await self._canary_weight(alias, canary[0]) if canary else 0
        targets = (served.version, 100 - weight), *([(canary[0].version, weight)] if weight else [])
        return await self._route(targets, epoch=alias.epoch)

    async def _canary_weight(self, alias: Alias, canary: Served) -> int:
        """The canary's share; 0 while it cannot be loaded: it must not keep the version that serves from answering."""
        try:
            await self._warm(alias, canary, deadline_s=time.monotonic())
        except FineryError as error:
            log.warning("a canary gets no requests", alias=alias.alias, version=canary.version, reason=error.message)
            return 0
        return alias.canary_weight

    async def _warm(self, alias: Alias, served: Served, *, deadline_s: float) -> None:
        if self._residency.serves(served.version):
            return
        try:
            path = await self._staging.fetch(served.adapter)
            await self._residency.ensure(served.version, path=path, deadline_s=deadline_s)
        except UnavailableError:
            raise
        except FineryError as error:
            # The reason may name files of this machine.
            log.error("a deployed version cannot be loaded", alias=alias.alias, version=served.version, reason=error.message)
            message = f"{alias.alias} is deployed but cannot be loaded; the operator finds the reason in serving's log. Deploy it again."
            raise FailedPreconditionError(message, code="adapter_not_loadable") from error

    async def _route(self, targets: tuple[tuple[str, int], ...], *, epoch: int) -> Route:
        generation, length = self._max_model_len
        if generation != self._process.generation:
            generation, length = self._process.generation, await self._client.max_model_len()
            self._max_model_len = (generation, length)
        runtime = self._process.runtime
        return Route(targets[0][0], targets, epoch, runtime.address, runtime.replica_token, self._process.config.base_model, length)


def _awaits_flip(alias: Alias, *, after_epoch: int) -> bool:
    """Whether only a rollout can give the answer. Raises NotFoundError where none is on its way."""
    if alias.version and alias.epoch > after_epoch:
        return False
    if alias.rollout.state.is_before_flip or alias.version:
        return True
    reason = (alias.rollout.error or {}).get("message", "")
    how = "was rolled back" if alias.rollout.state == RolloutState.ROLLED_BACK else "failed"
    raise NotFoundError(f"Nothing is deployed under {alias.alias}: its rollout {how}. {reason}", code="model_not_found", param="model")
