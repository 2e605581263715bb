"""Fine-tuning jobs as callers see them: create, pause, resume, cancel, delete, and what belongs to them.

Owns what each wish means in each state. Carrying it out is the scheduler's; what workers report is `attempts`'.

    QUEUED -> VALIDATING -> QUEUED (validated) -> RUNNING -> SUCCEEDED, then the deployment step
    QUEUED, VALIDATING, RUNNING -> PAUSED -> QUEUED; a lost attempt goes RUNNING -> QUEUED
    any that is not final -> FAILED, CANCELLED
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from finery_common.artifacts import ArtifactRef, ArtifactStore
from finery_common.catalogue import Catalogue
from finery_common.errors import FailedPreconditionError, FineryError, InvalidArgumentError
from finery_common.jobs import Job, JobEvent, JobPage, JobState, JobStore, Wanted
from finery_common.tracing import TRACEPARENT, traceparent
from finery_trainer.client import ServingClient
from finery_trainer.records import JobRequest, StepMetrics, alias_of, is_settled
from finery_trainer.requests import RequestChecks

_PAGE = 1000


@dataclass(frozen=True)
class Checkpoint:
    """An adapter that an epoch of a job left."""

    step: int
    metrics: StepMetrics
    adapter: ArtifactRef
    alias: str
    created_at: datetime


class Runs:
    """The jobs of all projects. `wake` tells the scheduler that there is something to do."""

    def __init__(
        self,
        jobs: JobStore,
        *,
        artifacts: ArtifactStore,
        catalogue: Catalogue,
        checks: RequestChecks,
        serving: ServingClient | None,
        wake: Callable[[], None],
    ) -> None:
        self._jobs = jobs
        self._artifacts = artifacts
        self._catalogue = catalogue
        self._checks = checks
        self._serving = serving
        self._wake = wake

    async def create(self, project: str, *, request: JobRequest, metadata: Mapping[str, str], request_id: str) -> Job:
        """Commits a job before it returns; raises as `RequestChecks.check` does. The same `request_id` and body give the same job."""
        if not await self._jobs.knows(project, request_id=request_id):
            await self._checks.check(request, project=project, metadata=metadata)
        job = await self._jobs.create(project, request_id=request_id, spec=request.to_fields(), metadata=metadata, progress=_trace())
        self._wake()
        return job

    async def get(self, project: str, job_id: str) -> Job:
        """Raises NotFoundError for a job that this project does not have."""
        return await self._jobs.get(project, job_id)

    async def list(self, project: str, *, page_size: int, page_token: str, metadata: Mapping[str, str]) -> JobPage:
        """Newest first."""
        return await self._jobs.list(project, page_size=page_size, page_token=page_token, metadata=metadata)

    async def cancel(self, project: str, job_id: str) -> Job:
        """Cancelled at once where nobody works on the job, within one step where somebody does. A final job is returned as it is."""
        job = await self._jobs.get(project, job_id)
        if not job.state.is_final:
            await self._request(job, Wanted.CANCEL, then=JobState.CANCELLED, message="The job was cancelled.")
        return await self._jobs.get(project, job_id)

    async def pause(self, project: str, job_id: str) -> Job:
        """Paused at once where nobody works on the job, after a checkpoint where somebody does. A paused job is returned as it is."""
        job = await self._jobs.get(project, job_id)
        if job.state is not JobState.PAUSED:
            await self._request(job, Wanted.PAUSE, then=JobState.PAUSED, message="The job was paused before it trained.")
        return await self._jobs.get(project, job_id)

    async def resume(self, project: str, job_id: str) -> Job:
        """Queues a paused job again, or takes back a pause that is still under way. Raises FailedPreconditionError for any other job."""
        job = await self._jobs.get(project, job_id)
        if job.state is not JobState.PAUSED:
            if job.wanted is not Wanted.PAUSE:
                raise FailedPreconditionError(f"Job {job_id} is {job.state}; only a paused job can be resumed.")
            # It may have become PAUSED since it was read.
            job = await self._jobs.request(job_id, None)
        if job.state is JobState.PAUSED:
            text = "The job goes on and waits for its turn."
            await self._jobs.transition(job_id, JobState.QUEUED, message=text, progress={"waits": None})
        self._wake()
        return await self._jobs.get(project, job_id)

    async def delete(self, project: str, job_id: str) -> None:
        """Removes a final job with its checkpoints, adapters, model and metrics.

        Raises FailedPreconditionError where it is not final, one of its adapters is deployed, or its model is a base model.
        """
        job = await self._jobs.get(project, job_id)
        if not is_settled(job):
            raise FailedPreconditionError(
                f"Job {job_id} is {job.state}{' and being deployed' if job.state.is_final else ''}; cancel it, or wait until it is done."
            )
        prefixes = await self._prefixes(job)
        await self._refuse_if_deployed(project, prefixes)
        self._refuse_if_base(prefixes)
        for prefix in prefixes:
            await asyncio.to_thread(self._artifacts.delete, prefix)
        await self._jobs.delete(job_id)

    async def watch(self, project: str, job_id: str, *, after_sequence: int) -> AsyncIterator[JobEvent]:
        """Every event after `after_sequence`, until the job and its deployment are final."""
        await self._jobs.get(project, job_id)
        async with contextlib.aclosing(self._jobs.watch(job_id, after_sequence=after_sequence, until=is_settled)) as events:
            async for event in events:
                yield event

    async def events(
        self, project: str, job_id: str, *, page_size: int, page_token: str, descending: bool
    ) -> tuple[tuple[JobEvent, ...], str]:
        """A page of events and the token of the next one: the last sequence that was shown."""
        await self._jobs.get(project, job_id)
        last = _number(page_token)
        size = min(page_size or 100, _PAGE)
        events = await self._jobs.events(
            job_id,
            after_sequence=0 if descending or last is None else last,
            before_sequence=last if descending else None,
            limit=size,
            descending=descending,
        )
        is_last_page = len(events) < size or (descending and events[-1].sequence == 1)
        return events, "" if is_last_page else str(events[-1].sequence)

    async def checkpoints(self, project: str, job_id: str, *, page_size: int, page_token: str) -> tuple[list[Checkpoint], str]:
        """A page of published adapters, newest first, and the token of the next one: the last step that was shown."""
        job = await self._jobs.get(project, job_id)
        before = _number(page_token)
        found = [item for item in await self._adapters(job) if before is None or item.step < before]
        size = min(page_size or 20, _PAGE)
        return found[:size], str(found[size - 1].step) if len(found) > size else ""

    async def _request(self, job: Job, wanted: Wanted, *, then: JobState, message: str) -> None:
        job = await self._jobs.request(job.id, wanted)
        if job.state in (JobState.QUEUED, JobState.PAUSED):
            # The scheduler may have taken the job meanwhile; then its worker hears of the wish.
            with contextlib.suppress(FineryError):
                lease_free = await self._jobs.get(job.project, job.id)
                if lease_free.lease_expires_at is None:
                    await self._jobs.transition(job.id, then, message=message)
        self._wake()

    async def _adapters(self, job: Job) -> list[Checkpoint]:
        by_step: dict[int, Checkpoint] = {}
        async for event in self._checkpoint_events(job.id):
            data = cast("dict[str, Any]", event.data)
            if "adapter" in data:
                step = int(data["step"])
                by_step[step] = Checkpoint(
                    step=step,
                    metrics=StepMetrics.from_fields(data["metrics"]),
                    adapter=ArtifactRef.model_validate(data["adapter"]),
                    alias=alias_of(job, checkpoint_step=step),
                    created_at=event.created_at,
                )
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    async def _checkpoint_events(self, job_id: str) -> AsyncIterator[JobEvent]:
        last = 0
        while events := await self._jobs.events(job_id, after_sequence=last, limit=_PAGE, type="checkpoint"):
            for event in events:
                yield event
            last = events[-1].sequence

    async def _prefixes(self, job: Job) -> list[str]:
        """Everything that the job has published."""
        folders = (f"projects/{job.project}/{kind}/{job.id}/" for kind in ("runs", "models"))
        refs = await asyncio.to_thread(lambda: [ref for folder in folders for ref in self._artifacts.list(folder)])
        return [*(ref.prefix for ref in refs), *(item.adapter.prefix for item in await self._adapters(job))]

    async def _refuse_if_deployed(self, project: str, prefixes: list[str]) -> None:
        for alias in await self._serving.aliases(project) if self._serving is not None else ():
            for adapter in (alias.adapter, alias.canary_adapter):
                if adapter is not None and adapter.prefix in prefixes:
                    what = adapter.prefix.split("/")[-2]
                    raise FailedPreconditionError(f"{what} is deployed as {alias.alias}; delete that model first.", code="still_deployed")

    def _refuse_if_base(self, prefixes: list[str]) -> None:
        for entry in self._catalogue.list():
            if entry.s3_prefix in prefixes:
                raise FailedPreconditionError(
                    f"This job's model is the catalogue's base model {entry.name}; take the entry out first.", code="still_in_use"
                )


def _number(page_token: str) -> int | None:
    if not page_token:
        return None
    if not page_token.isdigit():
        raise InvalidArgumentError("Got a page token that no list gave; pass next_page_token unchanged.", param="page_token")
    return int(page_token)


def _trace() -> dict[str, object]:
    """What ties the job's work, which others do later, to the request that created it."""
    trace = traceparent()
    return {TRACEPARENT: trace} if trace else {}
