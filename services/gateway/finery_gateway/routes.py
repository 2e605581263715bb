"""Which vLLM answers for a model: routes from the serving service, remembered, and dropped as soon as an alias changes; with them goes
what was counted of versions that are gone.

A forgotten or outdated route costs one refused request: vLLM's middleware refuses a retired version, and the proxy asks again. So the
watch below is for speed, never for correctness.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Set

import structlog

from finery_common.errors import DeadlineExceededError, FineryError, NotFoundError, UnavailableError
from finery_gateway.client import ServingClient, TrainingClient, UnreachableServiceError
from finery_gateway.resources import Alias, AliasEvent, Route
from finery_gateway.splits import targets_of
from finery_gateway.version_reports import VersionReports

ROUTE_TTL_S = 30.0
_WATCH_AGAIN_S = 1.0
_MAX_ROUTES = 100_000
_ASK_AGAIN_S = 0.2
_MAX_UNREACHABLE = 3
_JOB_MODEL = re.compile(r"ft:[^:]+:[^:]+:[^:]*:([0-9a-f]{24})")

log = structlog.get_logger(__name__)
_Key = tuple[str, str]


class Routes:
    """Routes by (project, model). `close` ends the watches."""

    def __init__(
        self, serving: ServingClient, *, training: TrainingClient, cold_wait_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._serving = serving
        self._training = training
        self.cold_wait_s = cold_wait_s
        """How long a model may take to be there."""
        self._clock = clock
        self._known: dict[_Key, tuple[Route, float]] = {}
        self._asking: dict[_Key, asyncio.Task[Route]] = {}
        # The latest that was heard of aliases while they are being asked for: the answer may be of before. None: gone, or maybe missed.
        self._heard: dict[_Key, Alias | None] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self.reports = VersionReports()

    async def route(self, project: str, model: str) -> Route:
        """Where a request for `model` goes now.

        Waits while it is being loaded. Raises NotFoundError for a model the project has not, UnavailableError when it takes too long.
        """
        key = (project, model)
        route, expires_s = self._known.get(key, (None, 0.0))
        if route is not None and expires_s > self._clock():
            return route
        if project not in self._watches:
            self._watches[project] = asyncio.create_task(self._watch(project))
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.create_task(self._resolve(key))
            task.add_done_callback(lambda done: self._asked(key, done))
        # One question for all who wait; it goes on when one of them leaves.
        return await asyncio.shield(task)

    def forget(self, project: str, model: str, *, route: Route) -> None:
        """Drops `route`, unless a newer one has taken its place."""
        known = self._known.get((project, model))
        if known is not None and known[0] == route:
            del self._known[(project, model)]

    async def close(self) -> None:
        """Stops watching and asking."""
        watches, asking = list(self._watches.values()), list(self._asking.values())
        for task in (*watches, *asking):
            task.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        await asyncio.gather(*asking, return_exceptions=True)

    def _asked(self, key: _Key, done: asyncio.Task[Route]) -> None:
        self._asking.pop(key, None)
        self._heard.pop(key, None)
        if not done.cancelled():
            done.exception()  # Seen, though everybody who waited may have left.

    async def _resolve(self, key: _Key) -> Route:
        project, model = key
        give_up_s = self._clock() + self.cold_wait_s
        was_ready, num_unreachable = False, 0
        while True:
            try:
                route = await self._serving.resolve(project, model=model, after_epoch=0, timeout_s=max(1.0, give_up_s - self._clock()))
                break
            except DeadlineExceededError as error:
                raise self._too_slow(model) from error
            except UnreachableServiceError:
                # Its agent ended while it was asked. Another, where there is one, answers at once.
                num_unreachable += 1
                if num_unreachable >= _MAX_UNREACHABLE:
                    raise
            except NotFoundError:
                state = await self._deployment_state(project, model)
                # One that turned ready between the two questions is asked for again; one that stays unknown was taken out.
                if state != "pending" and (state != "ready" or was_ready):
                    raise
                was_ready = state == "ready"
                if self._clock() >= give_up_s:
                    raise self._too_slow(model) from None
            await asyncio.sleep(_ASK_AGAIN_S)
        if key not in self._heard or _is_split_as(self._heard[key], route):
            if len(self._known) >= _MAX_ROUTES:
                self._known.clear()
            self._known[key] = (route, self._clock() + ROUTE_TTL_S)
        return route

    async def _all_versions(self, project: str) -> dict[str, Set[str]]:
        return {alias.alias: _versions(alias) async for alias in self._serving.all_aliases(project)}

    async def _deployment_state(self, project: str, model: str) -> str | None:
        """How far the deployment of a job's own model is: the job succeeds a moment before serving hears of its model."""
        job_hex = _JOB_MODEL.fullmatch(model)
        if job_hex is None:
            return None
        try:
            job = await self._training.get_job(project, job_id=f"ftjob-{job_hex[1]}")
        except FineryError:
            return None
        return job.deployment.state if job.state == "succeeded" and job.deployment.alias == model else None

    def _too_slow(self, model: str) -> UnavailableError:
        return UnavailableError(
            f"{model} is being loaded and was not ready within {self.cold_wait_s:.0f} s; try again.", retry_after_s=5, code="model_loading"
        )

    async def _watch(self, project: str) -> None:
        # It outlives the request that began it.
        structlog.contextvars.unbind_contextvars("request_id")
        while True:
            with contextlib.suppress(FineryError):
                # A watch tells of what is there, not of what was deleted before it began.
                self.reports.keep_aliases(project, await self._all_versions(project))
                async for event in self._serving.watch_aliases(project):
                    self._changed(project, event)
            log.info("the watch of aliases ended; starting it again", project=project)
            for key in [key for key in self._known if key[0] == project]:
                del self._known[key]
            self._heard.update({key: None for key in self._asking if key[0] == project})
            await asyncio.sleep(_WATCH_AGAIN_S)

    def _changed(self, project: str, event: AliasEvent) -> None:
        key = (project, event.alias.alias)
        alias = None if event.deleted else event.alias
        if key in self._asking:
            self._heard[key] = alias
        known = self._known.get(key)
        if known is not None and not _is_split_as(alias, known[0]):
            del self._known[key]
        self.reports.keep(project, event.alias.alias, frozenset() if alias is None else _versions(alias))


def _is_split_as(alias: Alias | None, route: Route) -> bool:
    if alias is None:
        return False
    return [(item.version, item.weight) for item in targets_of(alias)] == [(item.version, item.weight) for item in route.targets]


def _versions(alias: Alias) -> Set[str]:
    return {target.version for target in targets_of(alias)}
