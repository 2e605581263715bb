"""Moves jobs on: validates and starts what is queued, takes back what a dead worker held, ends what does not obey.

Owns when an attempt starts and what follows a lost one. All it knows is in the job store and the launcher, so a restart forgets nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import structlog

from finery_common.errors import AbortedError, FailedPreconditionError, FineryError, PermissionDeniedError, UnavailableError
from finery_common.jobs import EventLevel, Job, JobState, JobStore, Lease, Wanted
from finery_common.rpc.tokens import Principal, TokenSigner
from finery_common.tracing import span
from finery_trainer import metrics
from finery_trainer.launchers import Attempt, Exit, Launcher, Waiting
from finery_trainer.records import artifact_of, has_called, last_progress_of, request_of, traceparent_of, waiting_since, waits
from finery_trainer.settings import TrainerSettings
from finery_trainer.validation import Validation

MAX_LOST_ATTEMPTS = 3
POLL_S = 0.5
_VALIDATIONS_AT_ONCE = 4
_TOKEN_TTL_S = 30 * 24 * 3600.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0

log = structlog.get_logger(__name__)


class Scheduler:
    """Runs until cancelled. `holder` names this process in leases."""

    def __init__(self, jobs: JobStore, *, validation: Validation, signer: TokenSigner, settings: TrainerSettings, holder: str) -> None:
        self._jobs = jobs
        self._validation = validation
        self._signer = signer
        self._settings = settings
        self._holder = holder
        self._woken = asyncio.Event()
        self._validating: dict[str, asyncio.Task[None]] = {}
        self._cancelled_since_s: dict[str, float] = {}
        self._start_pause_s, self._no_start_before_s = _FIRST_PAUSE_S, 0.0
        self._shown: set[str] = set()
        self._exits: list[Exit] = []
        # Workers of the process before this one may have been unable to renew their leases; they get time to come back.
        self._patient_until_s = time.monotonic() + settings.lease_s

    def wake(self) -> None:
        """Something new is to be done; without it, it is noticed within `POLL_S`."""
        self._woken.set()

    async def run(self, launcher: Launcher) -> None:
        """Works until cancelled; validations under way are handed back."""
        try:
            while True:
                self._woken.clear()
                try:
                    await self._round(launcher)
                except FineryError as error:
                    log.warning("cannot move jobs on", error=error.message)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._woken.wait()
        finally:
            for task in self._validating.values():
                task.cancel()
            await asyncio.gather(*self._validating.values(), return_exceptions=True)

    async def take_exits(self, launcher: Launcher) -> None:
        """Notes the workers that ended. The launcher tells an end once, so one that cannot be noted now is kept for the next round."""
        self._exits += launcher.take_exits()
        if not self._exits:
            return
        running = await self._running()
        for ended in tuple(self._exits):
            try:
                if job := running.get((ended.job_id, ended.epoch)):
                    await self._ended(job, ended, launcher)
            except AbortedError:
                pass
            except FineryError as error:
                log.warning("cannot note how a worker ended", job_id=ended.job_id, epoch=ended.epoch, error=error.message)
                continue
            self._exits.remove(ended)

    async def _running(self) -> dict[tuple[str, int], Job]:
        return {(job.id, job.epoch): job for job in await self._jobs.find(JobState.RUNNING)}

    async def _round(self, launcher: Launcher) -> None:
        await self.take_exits(launcher)
        await self._hold_waiting(launcher)
        for job in await self._jobs.expired_leases():
            with _not_now(job.id):
                await self._unheld(job, launcher)
        await self._start_queued(launcher)
        running = await self._jobs.find(JobState.RUNNING)
        await self._end_disobedient(running, launcher)
        self._show_progress(running)
        for state, count in (await self._jobs.states_count()).items():
            metrics.JOBS.labels(state).set(count)

    def _show_progress(self, running: Sequence[Job]) -> None:
        """A job that has just ended may still be in the list: its gauges go with the next round."""
        called, now = {job.id: job for job in running if has_called(job)}, datetime.now(UTC)
        for job in called.values():
            metrics.LAST_PROGRESS.labels(job.id).set(last_progress_of(job, now=now).timestamp())
        for job_id in self._shown - called.keys():
            metrics.forget_job(job_id)
        if called.keys() - self._shown:
            self._start_pause_s = _FIRST_PAUSE_S
        self._shown = set(called)

    async def _unheld(self, job: Job, launcher: Launcher) -> None:
        if job.state is JobState.VALIDATING:
            await self._validate(job)
        elif time.monotonic() >= self._patient_until_s:
            await launcher.kill(job.id)
            await self._lost(job, f"has not reported for {self._settings.lease_s:.0f} s", launcher)

    async def _hold_waiting(self, launcher: Launcher) -> None:
        """Workers that have not begun can neither hold their leases nor obey; both is done for them."""
        if not (waiting := launcher.waiting()):
            return
        running = await self._running()
        for item in waiting:
            job = running.get((item.job_id, item.epoch))
            if job is None or has_called(job):
                continue
            with _not_now(job.id):
                if job.wanted is Wanted.NONE:
                    await self._hold(job, item)
                else:
                    await launcher.kill(job.id)
                    await self._requeue(job, "")

    async def _hold(self, job: Job, waiting: Waiting) -> None:
        lease_s = self._settings.lease_s
        if job.lease_expires_at is None or job.lease_expires_at - datetime.now(UTC) < timedelta(seconds=lease_s / 2):
            await self._jobs.renew(Lease(job.id, job.epoch), ttl_s=lease_s)
        mark = {"reason": waiting.reason, "epoch": job.epoch}
        if waiting.reason and job.progress.get("waiting") != mark:
            text = f"The worker waits: {waiting.text}."
            await self._jobs.append_event(job.id, type="message", message=text, progress={"waiting": mark}, epoch=job.epoch)

    async def _ended(self, job: Job, ended: Exit, launcher: Launcher) -> None:
        if ended.was_stopped:
            await self._requeue(job, f"The worker {ended.reason}; the job goes on from its last checkpoint.")
        elif ended.is_final and job.wanted is not Wanted.CANCEL:
            text = f"The worker {ended.reason}. Another attempt would end the same; {_log_of(job, launcher)}."
            await self._fail(job, text, code="worker_misconfigured")
        elif ended.never_began:
            await self._postpone(job, f"it {ended.reason}.")
        else:
            await self._lost(job, ended.reason, launcher)

    async def _lost(self, job: Job, reason: str, launcher: Launcher) -> None:
        """What follows an attempt that ended without saying how: what the job's owner wanted, another attempt, or failure."""
        metrics.LOST_ATTEMPTS.inc()
        before = cast("dict[str, Any]", job.progress.get("lost") or {})
        step = cast("int", job.result.get("checkpoint_step") or 0)
        count = before["count"] + 1 if before.get("step") == step else 1
        text = f"The worker of attempt {job.epoch} {reason}."
        await self._jobs.append_event(
            job.id, type="message", level=EventLevel.WARN, message=text, progress={"lost": {"count": count, "step": step}}, epoch=job.epoch
        )
        if job.wanted is not Wanted.CANCEL and count >= MAX_LOST_ATTEMPTS:
            log_of = _log_of(job, launcher)
            text += f" That was lost attempt {count} without a new checkpoint; {log_of}. Memory that runs out is a common cause."
            await self._fail(job, text, code="worker_lost")
        else:
            await self._requeue(job, f"The job goes on from step {step}." if step else "The job starts again.")

    async def _requeue(self, job: Job, message: str, *, progress: dict[str, object] | None = None) -> None:
        if job.wanted is Wanted.CANCEL:
            await self._end(job, JobState.CANCELLED, "The job was cancelled.")
        elif job.wanted is Wanted.PAUSE:
            await self._end(job, JobState.PAUSED, "The job is paused.")
        else:
            await self._end(job, JobState.QUEUED, message, progress=progress)

    async def _fail(self, job: Job, message: str, *, code: str) -> None:
        await self._end(job, JobState.FAILED, message, error={"code": code, "message": message, "violations": []})

    async def _end(
        self,
        job: Job,
        state: JobState,
        message: str,
        *,
        error: dict[str, object] | None = None,
        progress: dict[str, object] | None = None,
    ) -> None:
        await self._jobs.transition(job.id, state, message=message, error=error, progress=progress, epoch=job.epoch)
        metrics.forget_job(job.id)
        if error is not None:
            metrics.JOB_FAILURES.labels(str(error["code"])).inc()

    async def _start_queued(self, launcher: Launcher) -> None:
        running, queued = await self._jobs.find(JobState.RUNNING), await self._jobs.runnable(limit=100)
        free = self._settings.max_workers - len(running)
        waiting = [*queued, *(job for job in running if not has_called(job))]
        waits_s = [(datetime.now(UTC) - waiting_since(job)).total_seconds() for job in waiting]
        metrics.OLDEST_QUEUED_SECONDS.set(max(waits_s, default=0.0))
        for job in queued:
            with contextlib.suppress(AbortedError, FailedPreconditionError):
                if job.wanted is not Wanted.NONE:
                    await self._jobs.transition(job.id, _obeyed(job.wanted))
                elif not _is_validated(job):
                    await self._validate(job)
                elif free > 0 and time.monotonic() >= self._no_start_before_s:
                    free -= 1
                    if await self._can_launch(job, launcher):
                        await self._launch(job, launcher)

    async def _validate(self, job: Job) -> None:
        if job.id in self._validating or len(self._validating) >= _VALIDATIONS_AT_ONCE:
            return
        lease = await self._jobs.acquire(job.id, holder=self._holder, ttl_s=self._settings.lease_s)
        task = asyncio.create_task(self._validated(job, lease))
        self._validating[job.id] = task
        task.add_done_callback(lambda _: (self._validating.pop(job.id, None), self.wake()))

    async def _validated(self, job: Job, lease: Lease) -> None:
        try:
            with span("validate job", parent=traceparent_of(job), job_id=job.id):
                await self._validation.run(job, lease=lease)
        except AbortedError:
            return
        except FineryError as error:
            log.warning("a validation stopped and will be taken up again", job_id=job.id, error=error.message)
            await asyncio.sleep(POLL_S)
        finally:
            with contextlib.suppress(FineryError):
                await asyncio.shield(self._jobs.release(lease))

    async def _can_launch(self, job: Job, launcher: Launcher) -> bool:
        """Where it is known that no worker can be started, the job stays as it is; a reason is told once."""
        try:
            await launcher.check(Attempt(job.id, job.epoch + 1, "", gpus=request_of(job).spec.gpus))
        except (UnavailableError, PermissionDeniedError) as error:
            self._pause_starts(job, error.message)
            if job.progress.get("postponed") != error.message:
                progress = {"postponed": error.message} | waits(job, epoch=job.epoch)
                await self._jobs.append_event(job.id, type="message", message=_postponed(error.message), progress=progress)
            return False
        return True

    async def _launch(self, job: Job, launcher: Launcher) -> None:
        lease = await self._jobs.acquire(job.id, holder=self._holder, ttl_s=self._settings.lease_s)
        try:
            started = await self._jobs.transition(
                job.id,
                JobState.RUNNING,
                message="A worker starts.",
                epoch=lease.epoch,
                data={"epoch": lease.epoch},
                progress={"postponed": None} | waits(job, epoch=lease.epoch),
            )
        except FineryError:
            await self._jobs.release(lease)
            raise
        if job.started_at is None and started.started_at is not None:
            metrics.QUEUE_SECONDS.observe((started.started_at - job.created_at).total_seconds())
        token = self._signer.sign(Principal("worker", job.project, job.id, lease.epoch), ttl_s=_TOKEN_TTL_S)
        try:
            with span("launch worker", parent=traceparent_of(job), job_id=job.id, epoch=lease.epoch):
                await launcher.start(Attempt(job.id, lease.epoch, token, gpus=request_of(job).spec.gpus))
        except (UnavailableError, PermissionDeniedError) as error:
            await self._postpone(started, error.message)
        except FailedPreconditionError as error:
            await self._fail(started, f"The worker cannot be started: {error.message}", code=error.code)
        except FineryError as error:
            await self._lost(started, f"could not be started: {error.message}", launcher)

    async def _postpone(self, job: Job, reason: str) -> None:
        """Where no worker can start for now, whatever the job: it keeps its turn, and nothing is started for a while."""
        self._pause_starts(job, reason)
        await self._requeue(job, _postponed(reason), progress={"postponed": reason})

    def _pause_starts(self, job: Job, reason: str) -> None:
        self._no_start_before_s = time.monotonic() + self._start_pause_s
        self._start_pause_s = min(_LONGEST_PAUSE_S, self._start_pause_s * 2)
        log.warning("no worker can be started for now", job_id=job.id, reason=reason)

    async def _end_disobedient(self, running: Sequence[Job], launcher: Launcher) -> None:
        cancelled = {job.id: job for job in running if job.wanted is Wanted.CANCEL}
        now_s = time.monotonic()
        self._cancelled_since_s = {job_id: self._cancelled_since_s.get(job_id, now_s) for job_id in cancelled}
        for job_id, since_s in self._cancelled_since_s.items():
            if now_s - since_s >= self._settings.cancel_grace_s:
                with _not_now(job_id):
                    await launcher.kill(job_id)
                    await self._end(cancelled[job_id], JobState.CANCELLED, "The job was cancelled; its worker had to be ended.")


@contextlib.contextmanager
def _not_now(job_id: str) -> Iterator[None]:
    """One job that cannot be moved on holds up no other: it is taken up again in the next round."""
    try:
        yield
    except AbortedError:
        pass
    except FineryError as error:
        log.warning("cannot move a job on", job_id=job_id, error=error.message)


def _postponed(reason: str) -> str:
    return f"The worker cannot be started for now: {reason} It is tried again."


def _log_of(job: Job, launcher: Launcher) -> str:
    return f"its log: {launcher.log_place(job.id, epoch=job.epoch)}"


def _is_validated(job: Job) -> bool:
    needs_validation_file = request_of(job).validation_file is not None
    return artifact_of(job, "training_artifact") is not None and (
        not needs_validation_file or artifact_of(job, "validation_artifact") is not None
    )


def _obeyed(wanted: Wanted) -> JobState:
    return JobState.CANCELLED if wanted is Wanted.CANCEL else JobState.PAUSED
