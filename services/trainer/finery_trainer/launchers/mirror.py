"""What the API server has of one kind, kept here by list and watch.

Owns surviving what breaks: lost watches, 410 Gone, an API server that is away. What the objects mean is the caller's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

from finery_common.errors import FineryError, PermissionDeniedError
from finery_trainer.launchers.cluster import Cluster, Expired, Json, Kind

_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.2, 10.0

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Mirror(Generic[T]):
    """`items` are the parsed objects by name. `error` is what keeps it from being up to date, None while it is.

    An object is here only once the server has shown it, so one that is here no more was deleted. `on_change` is called after every change.
    """

    def __init__(self, cluster: Cluster, kind: Kind, *, selector: str, parse: Callable[[Json], T], on_change: Callable[[], None]) -> None:
        self.items: dict[str, T] = {}
        self.is_synced = False
        self.was_tried = asyncio.Event()
        self.error: FineryError | None = None
        self._cluster = cluster
        self._kind: Kind = kind
        self._selector = selector
        self._parse = parse
        self._on_change = on_change

    async def run(self) -> None:
        """Follows the server until cancelled."""
        wait_s = _FIRST_RETRY_S
        while True:
            try:
                version = await self._list()
                self.was_tried.set()
                while True:
                    version = await self._watch(version)
                    wait_s = _FIRST_RETRY_S
            except Expired:
                log.info("the API server has forgotten where the watch was; listing anew", kind=self._kind)
            except FineryError as error:
                self.error = error
                self.was_tried.set()
                log.warning("the cluster cannot be watched; trying again", kind=self._kind, error=error.message, wait_s=wait_s)
            await asyncio.sleep(_LONGEST_RETRY_S if isinstance(self.error, PermissionDeniedError) else wait_s)
            wait_s = min(_LONGEST_RETRY_S, wait_s * 2)

    async def _list(self) -> str:
        objects, version = await self._cluster.list(self._kind, selector=self._selector)
        self.items = {item["metadata"]["name"]: self._parse(item) for item in objects}
        self.is_synced, self.error = True, None
        self._on_change()
        return version

    async def _watch(self, version: str) -> str:
        events = self._cluster.watch(self._kind, selector=self._selector, version=version)
        async with contextlib.aclosing(events):
            async for change, item in events:
                version = item["metadata"]["resourceVersion"]
                name = item["metadata"].get("name")
                if change in ("ADDED", "MODIFIED"):
                    self.items[name] = self._parse(item)
                elif change == "DELETED":
                    self.items.pop(name, None)
                self._on_change()
        return version
