"""A worker's line to its server: reports in order, heartbeats beside them, patience while the server is away.

Owns a thread with an event loop, so that training never waits for a server that is gone. Only the server's refusal of this attempt,
or its absence for longer than the tolerance, ends the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

import structlog

from finery_common.errors import (
    AbortedError,
    DeadlineExceededError,
    FineryError,
    InternalError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from finery_trainer.client import Command, WorkerClient

_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.2, 3.0
_PROMPT_S = 5.0

T = TypeVar("T")
Call = Callable[[WorkerClient], Awaitable[T]]
log = structlog.get_logger(__name__)


class AttemptOver(Exception):
    """The server has given the job to somebody else, or to nobody: stop and publish nothing."""


class ServerGone(Exception):
    """The server has been away for longer than the tolerance."""


class Link:
    """A context manager. `command` is the last one that the server gave; `phase` is what heartbeats say the worker is doing."""

    def __init__(self, address: str, *, token: str, heartbeat_s: float, tolerance_s: float) -> None:
        self.command = Command.CONTINUE
        self.phase = "starting"
        self._address = address
        self._token = token
        self._heartbeat_s = heartbeat_s
        self._tolerance_s = tolerance_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
        self._failed: AttemptOver | ServerGone | None = None
        self._away_since_s: float | None = None

    def __enter__(self) -> Link:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, call: Call[T]) -> T:
        """The server's answer, after everything submitted before. Raises AttemptOver, ServerGone, or what the server says."""
        return self._submit(call).result()

    def report(self, call: Call[Command]) -> Command:
        """Sends a report and answers the server's command; while the server is away, the last one it gave.

        Raises AttemptOver and ServerGone, also for a report sent earlier.
        """
        future = self._submit(call)
        # An answer within this time is as of now; a server that is away must not hold up training.
        with contextlib.suppress(TimeoutError):
            self.command = future.result(timeout=_PROMPT_S if self._away_since_s is None else 0)
        return self.check()

    def confirm(self) -> None:
        """Returns when the server says that this attempt still holds the job. Raises AttemptOver or ServerGone."""
        self.command = self.ask(lambda client: client.heartbeat(self.phase))

    def check(self) -> Command:
        """The last command. Raises AttemptOver or ServerGone where the attempt cannot go on."""
        if self._failed is not None:
            raise self._failed
        return self.command

    def _submit(self, call: Call[T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(self._in_turn(call), self._loop)

    async def _in_turn(self, call: Call[T]) -> T:
        async with self._turn:
            return await self._persistently(call)

    async def _persistently(self, call: Call[T]) -> T:
        wait_s = _FIRST_RETRY_S
        while True:
            if self._failed is not None:
                raise self._failed
            try:
                answer = await call(self._client)
            except (UnavailableError, DeadlineExceededError, ResourceExhaustedError, InternalError) as error:
                self._note_away(error)
            except (AbortedError, NotFoundError, PermissionDeniedError, UnauthenticatedError) as error:
                self._failed = AttemptOver(error.message)
            else:
                self._away_since_s = None
                return answer
            await asyncio.sleep(0 if self._failed else wait_s)
            wait_s = min(_LONGEST_RETRY_S, wait_s * 2)

    def _note_away(self, error: Exception) -> None:
        now_s = time.monotonic()
        if self._away_since_s is None:
            self._away_since_s = now_s
            log.warning("the server is away; going on without it", error=str(error))
        if now_s - self._away_since_s > self._tolerance_s:
            self._failed = ServerGone(f"The server has been away for {self._tolerance_s:.0f} s: {error}")

    async def _open(self) -> None:
        self._client = WorkerClient(self._address, token=self._token)
        # First come, first served: reports stay in order.
        self._turn = asyncio.Lock()
        self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        """Apart from the reports' turn, so that a long queue of reports cannot delay the lease."""
        with contextlib.suppress(AttemptOver, ServerGone):
            while True:
                await asyncio.sleep(self._heartbeat_s)
                try:
                    self.command = await self._persistently(lambda client: client.heartbeat(self.phase))
                except FineryError as error:
                    log.warning("the server refused a heartbeat", error=error.message)

    async def _close(self) -> None:
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        await self._client.close()
