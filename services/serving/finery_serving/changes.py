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
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._next.wait(), timeout_s)
        return self.count != count
