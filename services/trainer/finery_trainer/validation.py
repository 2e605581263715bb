"""VALIDATING: has dataprep turn a job's files into datasets, and waits for them under the job's lease."""

from __future__ import annotations

import asyncio
import time

from finery_common.errors import (
    AbortedError,
    DeadlineExceededError,
    FineryError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from finery_common.jobs import EventLevel, Job, JobState, JobStore, Lease, Wanted
from finery_common.rpc.messages import error_fields
from finery_common.spec import DatasetSpec, DatasetType, MethodType, TrainingSpec
from finery_trainer.client import DataprepClient, DatasetStatus
from finery_trainer.metrics import JOB_FAILURES
from finery_trainer.records import request_of, text_of

PATIENCE_S = 600.0
"""How long data preparation may be unable to answer before the job fails."""
_FIRST_POLL_S, _LONGEST_POLL_S = 0.1, 2.0
# Dataprep's word for a file at fault; a job says which of its files that is.
_BAD_FILE = "invalid_training_file"
_TRANSIENT = (UnavailableError, DeadlineExceededError, ResourceExhaustedError, InternalError, AbortedError)


class Validation:
    """Dataset request ids are made of the job's id, so that a second validation finds the first one's datasets."""

    def __init__(self, jobs: JobStore, *, dataprep: DataprepClient, lease_s: float) -> None:
        self._jobs = jobs
        self._dataprep = dataprep
        self._lease_s = lease_s

    async def run(self, job: Job, *, lease: Lease) -> None:
        """Leaves the job QUEUED with its datasets, FAILED with what is wrong in them or why there are none, PAUSED or CANCELLED.

        Raises AbortedError where the lease is lost.
        """
        if job.state is not JobState.VALIDATING:
            await self._jobs.transition(job.id, JobState.VALIDATING, message="The files are being checked and prepared.", epoch=lease.epoch)
        try:
            for role in ("training", "validation"):
                if not await self._prepare(job, lease=lease, role=role):
                    return
        except InvalidArgumentError as error:
            # What dataprep said cannot be stored.
            await self._jobs.transition(job.id, JobState.FAILED, message=error.message, error=error_fields(error), epoch=lease.epoch)
            JOB_FAILURES.labels(error.code).inc()
            return
        await self._jobs.transition(
            job.id, JobState.QUEUED, message="The files are ready; the job waits for a free worker.", epoch=lease.epoch
        )

    async def _prepare(self, job: Job, *, lease: Lease, role: str) -> bool:
        """False where the job's state was changed: there is nothing more to do."""
        request = request_of(job)
        file = request.training_file if role == "training" else request.validation_file
        if file is None:
            return True
        spec = _dataset_of(request.spec, file=file)
        dataset = await self._wait(job, lease=lease, role=role, spec=spec)
        if dataset is None:
            return False
        if dataset.state is not JobState.SUCCEEDED or dataset.artifact is None:
            error = _of_role(dataset, role=role)
            await self._jobs.transition(job.id, JobState.FAILED, message=str(error["message"]), error=error, epoch=lease.epoch)
            JOB_FAILURES.labels(str(error["code"])).inc()
            return False
        await self._jobs.append_event(
            job.id,
            type="message",
            message=f"The {role} file is prepared.",
            data={"dataset": dataset.id},
            result={f"{role}_artifact": dataset.artifact.model_dump()},
            epoch=lease.epoch,
        )
        return True

    async def _wait(self, job: Job, *, lease: Lease, role: str, spec: DatasetSpec) -> DatasetStatus | None:
        """The dataset when it is final; None where the job was paused or cancelled meanwhile."""
        poll_s, away_since_s = _FIRST_POLL_S, None
        dataset: DatasetStatus | None = None
        while True:
            job = await self._jobs.renew(lease, ttl_s=self._lease_s)
            if job.wanted is not Wanted.NONE:
                await self._stop(job, lease=lease, dataset=dataset)
                return None
            try:
                dataset = await self._ask(job, role=role, spec=spec, dataset=dataset)
            except _TRANSIENT as error:
                if away_since_s is None:
                    away_since_s = time.monotonic()
                    text = f"Waiting for data preparation: {error.message}"
                    await self._jobs.append_event(job.id, type="message", message=text, level=EventLevel.WARN, epoch=lease.epoch)
                elif (away_s := time.monotonic() - away_since_s) > PATIENCE_S:
                    fields = error_fields(error)
                    fields["message"] = f"Data preparation has not worked for {away_s:.0f} s: {error.message}"
                    return _failed(dataset, fields)
            except FineryError as error:
                return _failed(dataset, error_fields(error))
            else:
                away_since_s = None
                await self._note_dataset(job, role=role, dataset=dataset, lease=lease)
                if dataset.state.is_final:
                    return dataset
            await asyncio.sleep(poll_s)
            poll_s = min(_LONGEST_POLL_S, poll_s * 1.5)

    async def _ask(self, job: Job, *, role: str, spec: DatasetSpec, dataset: DatasetStatus | None) -> DatasetStatus:
        if dataset is None:
            return await self._dataprep.create(job.project, spec=spec, request_id=f"{job.id}-{role}")
        return await self._dataprep.get(job.project, dataset_id=dataset.id)

    async def _note_dataset(self, job: Job, *, role: str, dataset: DatasetStatus, lease: Lease) -> None:
        if text_of(job, f"{role}_dataset") != dataset.id:
            text = f"Preparing the {role} file as {dataset.id}."
            await self._jobs.append_event(job.id, type="message", message=text, result={f"{role}_dataset": dataset.id}, epoch=lease.epoch)

    async def _stop(self, job: Job, *, lease: Lease, dataset: DatasetStatus | None) -> None:
        if job.wanted is Wanted.PAUSE:
            await self._jobs.transition(job.id, JobState.PAUSED, message="The job was paused before it trained.", epoch=lease.epoch)
            return
        await self._jobs.transition(job.id, JobState.CANCELLED, message="The job was cancelled.", epoch=lease.epoch)
        if dataset is not None and not dataset.state.is_final:
            try:
                await self._dataprep.cancel(job.project, dataset_id=dataset.id)
            except FineryError:
                # It may be final by now; a dataset that is prepared in vain does no harm.
                return


def _dataset_of(spec: TrainingSpec, *, file: str) -> DatasetSpec:
    """What is made of `file` for a run of `spec`."""
    kind = DatasetType.PREFERENCE if spec.method is MethodType.DPO else DatasetType.SUPERVISED
    return DatasetSpec(file=file, base_model=spec.base_model, max_sequence_length=spec.max_sequence_length, type=kind)


def _failed(dataset: DatasetStatus | None, error: dict[str, object]) -> DatasetStatus:
    """The dataset as one that cannot be had, for dataprep's refusal or its absence."""
    return DatasetStatus("" if dataset is None else dataset.id, JobState.FAILED, error, None)


def _of_role(dataset: DatasetStatus, *, role: str) -> dict[str, object]:
    """The dataset's error in the job's words: only a file at fault is named so."""
    text = f"The {role} file's dataset {dataset.id} is {dataset.state}, so the job cannot train; create the job again."
    error = dataset.error or {"code": "dataset_lost", "message": text, "violations": []}
    if error["code"] == _BAD_FILE:
        return error | {"code": f"invalid_{role}_file", "param": f"{role}_file"}
    return error | {"param": f"{role}_file"} if error.get("param") == "file" else error
