"""What workers report: assignments, heartbeats, steps, checkpoints, ends. A stale epoch changes nothing and raises AbortedError.

Owns how a report becomes events, results and metrics. When attempts start, and what follows a lost one, is the scheduler's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

import structlog

from finery_common.artifacts import ArtifactRef, ArtifactStore
from finery_common.errors import AbortedError, DataLossError, FineryError, InvalidArgumentError
from finery_common.jobs import Job, JobState, JobStore, Lease, Wanted
from finery_common.spec import MethodType
from finery_trainer import metrics
from finery_trainer.client import Assignment, Command
from finery_trainer.records import (
    CheckpointReport,
    DeploymentState,
    StepMetrics,
    artifact_of,
    metrics_of,
    pace_after,
    request_of,
    traceparent_of,
)

log = structlog.get_logger(__name__)


class Attempts:
    """`serves` says whether models are deployed at all; `wake` tells the scheduler that there is something to do."""

    def __init__(self, jobs: JobStore, *, artifacts: ArtifactStore, lease_s: float, serves: bool, wake: Callable[[], None]) -> None:
        self._jobs = jobs
        self._artifacts = artifacts
        self._lease_s = lease_s
        self._serves = serves
        self._wake = wake

    async def assignment(self, lease: Lease) -> Assignment:
        """What the attempt is to do."""
        job = await self._renew(lease)
        request = request_of(job)
        training = artifact_of(job, "training_artifact")
        assert training is not None, "a running job was validated"
        return Assignment(
            project=job.project,
            job_id=job.id,
            epoch=lease.epoch,
            spec=request.spec,
            training_dataset=training,
            validation_dataset=artifact_of(job, "validation_artifact"),
            checkpoint=artifact_of(job, "checkpoint"),
            traceparent=traceparent_of(job),
        )

    async def heartbeat(self, lease: Lease, *, phase: str) -> Command:
        """Renews the lease; a new phase becomes an event."""
        job = await self._renew(lease)
        mark = {"phase": phase, "epoch": lease.epoch}
        if phase and job.progress.get("phase") != mark:
            text = f"The worker is {phase}."
            await self._jobs.append_event(job.id, type="message", message=text, progress={"phase": mark}, epoch=lease.epoch)
        return _command(job)

    async def step(self, lease: Lease, *, report: StepMetrics) -> Command:
        """Records a step. One that this attempt has reported before changes nothing: its answer was lost."""
        job = await self._renew(lease)
        before = cast("dict[str, Any]", job.progress.get("pace") or {})
        if before.get("epoch") == lease.epoch and before["step"] >= report.step:
            return _command(job)
        pace = pace_after(job, report, epoch=lease.epoch, now=datetime.now(UTC))
        last = metrics_of(job)
        job = await self._jobs.append_event(
            job.id,
            type="step",
            message=f"Step {report.step}/{report.num_steps}: training loss {report.loss:.3f}.",
            data=report.to_fields(),
            progress={"metrics": report.to_fields(), "pace": pace},
            epoch=lease.epoch,
        )
        # After a resumed attempt's first step the count goes on from what that attempt has reported.
        num_tokens = max(0, report.num_trained_tokens - (last.num_trained_tokens if last is not None else 0))
        pace_s = cast("float | None", pace["seconds_per_step"])
        metrics.show_step(job.id, report, seconds_per_step=pace_s, num_new_tokens=num_tokens)
        return _command(job)

    async def checkpoint(self, lease: Lease, *, report: CheckpointReport) -> Command:
        """Records a published full state, and adapter, and lets go of the states beyond `checkpoint.keep`. Repeating it changes nothing."""
        job = await self._renew(lease)
        mark = {"step": report.step, "epoch": lease.epoch}
        if job.progress.get("reported_checkpoint") == mark:
            return _command(job)
        states = [ArtifactRef.model_validate(item) for item in cast("list[object]", job.result.get("states") or [])]
        data: dict[str, object] = {"step": report.step, "metrics": report.metrics.to_fields()}
        result: dict[str, object] = {}
        if report.state is not None:
            await self._require(report.state, job=job, folder=f"runs/{job.id}/checkpoints/{report.step}/")
            states = [*(ref for ref in states if ref.prefix != report.state.prefix), report.state]
            data["state"] = report.state.model_dump()
            keep = request_of(job).spec.checkpoint.keep
            states, dropped = states[-keep:], states[:-keep]
            result = {
                "checkpoint": report.state.model_dump(),
                "checkpoint_step": report.step,
                "states": [ref.model_dump() for ref in states],
            }
        else:
            dropped = []
        if report.adapter is not None:
            await self._require(report.adapter, job=job, folder=f"adapters/{job.id}-{report.step}/")
            data["adapter"] = report.adapter.model_dump()
        what = "The checkpoint and adapter" if report.adapter is not None else "The checkpoint"
        verb = "are" if report.adapter is not None else "is"
        job = await self._jobs.append_event(
            job.id,
            type="checkpoint",
            message=f"{what} of step {report.step} {verb} saved.",
            data=data,
            result=result,
            progress={"reported_checkpoint": mark},
            epoch=lease.epoch,
        )
        await self._drop(dropped)
        return _command(job)

    async def finish(
        self,
        lease: Lease,
        *,
        state: JobState,
        error: dict[str, object] | None,
        adapter: ArtifactRef | None,
        model: ArtifactRef | None,
        metrics_file: ArtifactRef | None,
    ) -> None:
        """Ends the attempt. A success needs its adapter or model to be published; what follows a pause's save is what is wanted by then."""
        job = await self._renew(lease)
        if state is JobState.SUCCEEDED:
            await self._succeed(job, lease=lease, adapter=adapter, model=model, metrics_file=metrics_file)
        elif state is JobState.FAILED:
            error = error or {
                "code": "internal_error",
                "message": "The worker failed without saying why; its log has more.",
                "violations": [],
            }
            await self._jobs.transition(job.id, state, message=str(error["message"]), error=error, epoch=lease.epoch)
            metrics.JOB_FAILURES.labels(str(error["code"])).inc()
        elif state is JobState.PAUSED:
            await self._stand_by(job)
        elif state is JobState.CANCELLED:
            await self._jobs.transition(job.id, state, message="The job was cancelled.", epoch=lease.epoch)
        else:
            raise InvalidArgumentError(f"state: got {state}, wanted SUCCEEDED, PAUSED, CANCELLED or FAILED", param="state")
        metrics.forget_job(job.id)
        self._wake()

    async def _succeed(
        self, job: Job, *, lease: Lease, adapter: ArtifactRef | None, model: ArtifactRef | None, metrics_file: ArtifactRef | None
    ) -> None:
        request, last = request_of(job), metrics_of(job)
        is_full = request.spec.method is MethodType.FULL
        what, trained = ("model", model) if is_full else ("adapter", adapter)
        if trained is None or metrics_file is None:
            raise InvalidArgumentError(f"{what}, metrics_file: both are needed for SUCCEEDED", param=what)
        assert last is not None, "a job that succeeded has reported a step"
        name = f"models/{job.id}" if is_full else f"adapters/{job.id}-{last.num_steps}"
        await self._require(trained, job=job, folder=f"{name}/")
        await self._require(metrics_file, job=job, folder=f"runs/{job.id}/metrics/")
        deploys = self._serves and request.deploy is not False and not is_full
        await self._jobs.transition(
            job.id,
            JobState.SUCCEEDED,
            message=f"The {what} is published as {name}.",
            result={
                what: trained.model_dump(),
                "metrics_file": metrics_file.model_dump(),
                "deployment_state": DeploymentState.PENDING if deploys else DeploymentState.NONE,
            },
            epoch=lease.epoch,
        )

    async def _stand_by(self, job: Job) -> None:
        """The worker has saved the state for a pause; meanwhile the pause may have been taken back, or become a cancellation."""
        if job.wanted is Wanted.NONE:
            text = "The pause was taken back; the job goes on from its saved state."
            await self._jobs.transition(job.id, JobState.QUEUED, message=text, epoch=job.epoch)
        elif job.wanted is Wanted.CANCEL:
            await self._jobs.transition(job.id, JobState.CANCELLED, message="The job was cancelled.", epoch=job.epoch)
        else:
            job = await self._jobs.transition(job.id, JobState.PAUSED, message="The job is paused; its state is saved.", epoch=job.epoch)
            # The cancellation came just before the transition.
            if job.wanted is Wanted.CANCEL:
                await self._jobs.transition(job.id, JobState.CANCELLED, message="The job was cancelled.")

    async def _renew(self, lease: Lease) -> Job:
        job = await self._jobs.renew(lease, ttl_s=self._lease_s)
        if job.state is not JobState.RUNNING:
            raise AbortedError(f"Job {job.id} is {job.state}; this attempt is over.", code="stale_epoch")
        return job

    async def _require(self, ref: ArtifactRef, *, job: Job, folder: str) -> None:
        wanted = f"projects/{job.project}/{folder}"
        if ref.prefix != wanted:
            raise InvalidArgumentError(f"prefix: got {ref.prefix!r}, wanted {wanted!r}", param="prefix")
        if not await asyncio.to_thread(self._artifacts.exists, ref):
            raise DataLossError(f"{ref.prefix} has no manifest; publish it before reporting it.")

    async def _drop(self, states: list[ArtifactRef]) -> None:
        for ref in states:
            try:
                await asyncio.to_thread(self._artifacts.delete, ref)
            except FineryError as error:
                log.warning("an old checkpoint could not be removed; deleting the job removes it", prefix=ref.prefix, error=error.message)


def _command(job: Job) -> Command:
    return {Wanted.NONE: Command.CONTINUE, Wanted.PAUSE: Command.PAUSE, Wanted.CANCEL: Command.CANCEL}[job.wanted]
