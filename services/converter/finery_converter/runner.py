"""Takes conversions that wait and attempts them, one at a time: each uses the whole disk and half of the cores.

Owns which job is next, leases, and the cancelling of jobs nobody works on. What happens within an attempt is `attempt`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from datetime import UTC, datetime

import structlog

from finery_common.errors import AbortedError, FineryError
from finery_common.jobs import Job, JobState, Lease, Wanted
from finery_converter.attempt import LEASE_S, Attempt, Workplace
from finery_converter.metrics import JOBS, QUEUE_SECONDS

POLL_S = 1.0
_LOOK_AHEAD = 1000

log = structlog.get_logger(__name__)


class ConversionRunner:
    """Runs until cancelled; `holder` names this process in leases."""

    def __init__(self, workplace: Workplace, *, holder: str) -> None:
        self._place = workplace
        self._holder = holder
        self._woken = asyncio.Event()
        self._attempt_woken = asyncio.Event()
        self._current: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Something is to be done; without it, it is noticed within seconds."""
        self._woken.set()
        self._attempt_woken.set()

    async def run(self) -> None:
        """Takes jobs as they come. Cancelled, it kills its worker and gives its job back for the next start."""
        shutil.rmtree(self._place.scratch_dir, ignore_errors=True)
        try:
            while True:
                self._woken.clear()
                try:
                    await self._take_jobs()
                except FineryError as error:
                    log.warning("cannot look for conversions", error=error.message)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._woken.wait()
        finally:
            if self._current is not None:
                self._current.cancel()
                await asyncio.gather(self._current, return_exceptions=True)

    async def _take_jobs(self) -> None:
        for job in (*await self._place.jobs.expired_leases(), *await self._place.jobs.runnable(limit=_LOOK_AHEAD)):
            untouched = job.state == JobState.QUEUED and job.wanted == Wanted.CANCEL
            if untouched:
                await self._under_lease(job)
            elif self._current is None:
                self._current = asyncio.create_task(self._under_lease(job))
                self._current.add_done_callback(self._finished)
        for state, count in (await self._place.jobs.states_count()).items():
            JOBS.labels(state).set(count)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._current = None
        self._woken.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("attempt failed", exc_info=error)

    async def _under_lease(self, job: Job) -> None:
        jobs = self._place.jobs
        try:
            lease = await jobs.acquire(job.id, holder=self._holder, ttl_s=LEASE_S)
        except FineryError as error:
            log.info("conversion not taken", job_id=job.id, reason=error.message)
            return
        try:
            with structlog.contextvars.bound_contextvars(job_id=job.id, epoch=lease.epoch):
                await self._attempt(job, lease)
        except FineryError as error:
            log.warning("attempt stopped", job_id=job.id, epoch=lease.epoch, lost=isinstance(error, AbortedError), reason=error.message)
        finally:
            with contextlib.suppress(FineryError):
                await asyncio.shield(jobs.release(lease))

    async def _attempt(self, job: Job, lease: Lease) -> None:
        if job.state == JobState.QUEUED and job.wanted == Wanted.CANCEL:
            await self._place.jobs.transition(job.id, JobState.CANCELLED, epoch=lease.epoch)
            return
        if lease.epoch == 1:
            QUEUE_SECONDS.observe((datetime.now(UTC) - job.created_at).total_seconds())
        await Attempt(self._place, job, lease, woken=self._attempt_woken).run()
