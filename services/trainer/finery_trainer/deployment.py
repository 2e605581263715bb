"""The deployment step of a succeeded job: asks serving for the job's alias and retries until it answers or the tries are used up.

The step is part of the job's row, so it goes on after a restart. Its failure never changes the job's state.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import structlog

from finery_common.errors import FineryError, InvalidArgumentError, NotFoundError
from finery_common.jobs import EventLevel, Job, JobState, JobStore
from finery_common.tracing import span
from finery_trainer.client import AliasStatus, ServingClient
from finery_trainer.metrics import DEPLOYMENTS
from finery_trainer.records import DeploymentState, alias_of, artifact_of, request_of, traceparent_of

MAX_TRIES = 10
POLL_S = 0.5
_LONGEST_WAIT_S = 60.0

log = structlog.get_logger(__name__)


class Deployments:
    """The reconciler of deployments. `first_wait_s` is doubled after every failed try."""

    def __init__(self, jobs: JobStore, *, serving: ServingClient, first_wait_s: float = 2.0) -> None:
        self._jobs = jobs
        self._serving = serving
        self._first_wait_s = first_wait_s

    async def run(self) -> None:
        """Works until cancelled."""
        while True:
            try:
                for job in await self._jobs.find(JobState.SUCCEEDED, result={"deployment_state": DeploymentState.PENDING}):
                    await self._advance(job)
            except FineryError as error:
                log.warning("cannot look for deployments", error=error.message)
            await asyncio.sleep(POLL_S)

    async def _advance(self, job: Job) -> None:
        step = cast("dict[str, Any]", job.progress.get("deployment") or {"tries": 0, "asked": False, "next_at": ""})
        if step["next_at"] and datetime.fromisoformat(step["next_at"]) > datetime.now(UTC):
            return
        try:
            if not step["asked"]:
                if not await self._is_wanted(job):
                    return
                alias = await self._ask(job, tries=step["tries"])
                await self._note(job, f"The model is being deployed as {alias_of(job)}.", tries=step["tries"], asked=True)
            else:
                alias = await self._serving.get(job.project, alias=alias_of(job))
            await self._judge(job, alias, tries=step["tries"])
        except NotFoundError as error:
            await self._retry(job, "its alias is gone" if step["asked"] else error.message, tries=step["tries"])
        except InvalidArgumentError as error:
            await self._end(job, DeploymentState.FAILED, f"The model cannot be deployed: {error.message}", EventLevel.WARN)
        except FineryError as error:
            await self._retry(job, error.message, tries=step["tries"])

    async def _is_wanted(self, job: Job) -> bool:
        request = request_of(job)
        if request.deploy is None and request.spec.base_model not in await self._serving.served_bases(job.project):
            await self._end(job, DeploymentState.NONE, f"{request.spec.base_model} is not being served here, so the model is not deployed.")
            return False
        return True

    async def _ask(self, job: Job, *, tries: int) -> AliasStatus:
        adapter = artifact_of(job, "adapter")
        assert adapter is not None, "a succeeded job has an adapter"
        with span("deploy adapter", parent=traceparent_of(job), job_id=job.id):
            return await self._serving.deploy(job.project, alias=alias_of(job), adapter=adapter, request_id=f"{job.id}-deploy-{tries}")

    async def _judge(self, job: Job, alias: AliasStatus, *, tries: int) -> None:
        adapter = artifact_of(job, "adapter")
        assert adapter is not None, "a succeeded job has an adapter"
        if alias.is_serving and alias.adapter is not None and alias.adapter.manifest_sha256 == adapter.manifest_sha256:
            await self._end(job, DeploymentState.READY, f"The model answers as {alias_of(job)}.")
        elif alias.error is not None:
            await self._retry(job, alias.error, tries=tries)

    async def _retry(self, job: Job, reason: str, *, tries: int) -> None:
        if tries + 1 >= MAX_TRIES:
            text = f"The model could not be deployed in {MAX_TRIES} tries: {reason}. It is trained and published; deploy it by hand."
            await self._end(job, DeploymentState.FAILED, text, EventLevel.WARN)
            return
        wait_s = min(_LONGEST_WAIT_S, self._first_wait_s * 2**tries)
        text = f"The deployment failed and is tried again in {wait_s:.0f} s: {reason}"
        await self._note(job, text, tries=tries + 1, asked=False, wait_s=wait_s, level=EventLevel.WARN)

    async def _note(
        self, job: Job, message: str, *, tries: int, asked: bool, wait_s: float = 0.0, level: EventLevel = EventLevel.INFO
    ) -> None:
        next_at = (datetime.now(UTC) + timedelta(seconds=wait_s)).isoformat()
        await self._jobs.append_event(
            job.id,
            type="deployment",
            message=message,
            level=level,
            data={"state": DeploymentState.PENDING, "alias": alias_of(job)},
            progress={"deployment": {"tries": tries, "asked": asked, "next_at": next_at}},
            result={"deployment_message": message},
        )

    async def _end(self, job: Job, state: DeploymentState, message: str, level: EventLevel = EventLevel.INFO) -> None:
        DEPLOYMENTS.labels(state).inc()
        await self._jobs.append_event(
            job.id,
            type="deployment",
            message=message,
            level=level,
            data={"state": state, "alias": alias_of(job)},
            result={"deployment_state": state, "deployment_message": message},
        )
