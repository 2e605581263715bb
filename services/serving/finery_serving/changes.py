"""One signal for everything that a waiter may wait for: aliases, rollouts, the replica. Waiters look again after each."""

from __future__ import annotations

import asyncio
import contextlib


class Changes:
    """Read `count`, look, then `wait_after(count)`: no change in between is missed."""

    def __init__(self) -> None:
        self.count = 0
        self._next = asyncio.Event()

    def notify(self) -> None:
        """Wakes all who wait."""
        self.count += 1
        self._next.set()
        self._next = asyncio.Event()

    async def wait_after(self, count: int, *, timeout_s: float | None = None) -> bool:
        """Waits for a change after the one numbered `count`, at most `timeout_s` seconds; answers whether there was one."""
        if self.count == count:
            # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._next.wait()
        return self.count != count
