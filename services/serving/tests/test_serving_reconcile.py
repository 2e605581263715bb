"""What the reconciler does with work that fails."""

import asyncio
import itertools
import time

from finery_common.errors import UnavailableError
from finery_serving import reconcile
from finery_serving.changes import Changes
from finery_serving.reconcile import Reconciler


async def test_work_that_fails_at_once_is_begun_again_after_longer_and_longer_pauses(monkeypatch):
    monkeypatch.setattr(reconcile, "_NO_PAUSE", reconcile._Pause(0.05, 0.0))
    changes = Changes()
    parts = dict.fromkeys(("runner", "residency", "registry", "placement", "staging"))
    reconciler = Reconciler(None, **parts, changes=changes)  # pyright: ignore[reportArgumentType]
    begun_s: list[float] = []

    async def fail() -> None:
        begun_s.append(time.monotonic())
        raise UnavailableError("The database cannot be reached.")

    async with asyncio.timeout(20):
        while len(begun_s) < 4:
            seen = changes.count
            # As a pass does, which every change brings.
            reconciler._spawn("drain 1", fail())
            await changes.wait_after(seen)
    assert all(later - earlier >= pause_s for (earlier, later), pause_s in zip(itertools.pairwise(begun_s), (0.1, 0.2, 0.4), strict=True))
