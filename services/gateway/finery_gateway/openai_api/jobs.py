"""`/v1/fine_tuning/jobs`: OpenAI's objects, with `spec`, `deployment` and `metrics` added."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Path, Query, Request

from finery_common.errors import InvalidArgumentError
from finery_common.resource_names import model_alias
from finery_common.text_forms import JOB_ID
from finery_gateway.client import NewJob
from finery_gateway.context import CreateAttempt, GatewayParts, Project
from finery_gateway.openai_api.files import require_training_file, results_file_id
from finery_gateway.openai_api.job_fields import JobFields, shown_hyperparameters, shown_method
from finery_gateway.openai_api.pages import page
from finery_gateway.resources import FINAL_STATES, Checkpoint, Job, JobEvent

_STATUS = {"validating": "validating_files"}
_METADATA = re.compile(r"metadata\[(.+)\]")
_LEVELS = {"info", "warn", "error"}

JobId = Annotated[str, Path(pattern=JOB_ID)]
Limit = Annotated[int, Query(ge=1, le=1000)]
router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])


@router.post("")
async def create_job(fields: JobFields, gateway: GatewayParts, project: Project, attempt: CreateAttempt) -> dict[str, Any]:
    """Create a fine-tuning job."""
    spec = fields.require_supported().training_spec()
    await require_training_file(gateway, project, fields.training_file, param="training_file")
    if fields.validation_file is not None:
        await require_training_file(gateway, project, fields.validation_file, param="validation_file")
    new = NewJob(fields.training_file, fields.validation_file, spec, fields.suffix or "", fields.metadata or {}, fields.deploy)

    async def create(request_id: str) -> Job:
        return await gateway.training.create_job(project, job=new, request_id=request_id)

    body = fields.model_dump(mode="json")
    job = await gateway.creates.run(project, collection="jobs", attempt=attempt, body=body, request_id=uuid4().hex, create=create)
    return shown_job(job, project=project)


@router.get("")
async def list_jobs(request: Request, gateway: GatewayParts, project: Project, *, after: str = "", limit: Limit = 20) -> dict[str, Any]:
    """List jobs, newest first; `metadata[key]=value` filters."""
    pairs = {match[1]: value for key, value in request.query_params.items() if (match := _METADATA.fullmatch(key))}
    found = await gateway.training.list_jobs(project, page_size=limit, page_token=after, metadata=pairs)
    return page([shown_job(job, project=project) for job in found.data], has_more=bool(found.next_page_token))


@router.get("/{job_id}")
async def retrieve_job(gateway: GatewayParts, project: Project, job_id: JobId) -> dict[str, Any]:
    """A job as it is now."""
    return shown_job(await gateway.training.get_job(project, job_id=job_id), project=project)


@router.post("/{job_id}/cancel")
async def cancel_job(gateway: GatewayParts, project: Project, job_id: JobId) -> dict[str, Any]:
    """Stop a job within one step."""
    return shown_job(await gateway.training.cancel_job(project, job_id=job_id), project=project)


@router.post("/{job_id}/pause")
async def pause_job(gateway: GatewayParts, project: Project, job_id: JobId) -> dict[str, Any]:
    """Checkpoint a job and stop it."""
    return shown_job(await gateway.training.pause_job(project, job_id=job_id), project=project)


@router.post("/{job_id}/resume")
async def resume_job(gateway: GatewayParts, project: Project, job_id: JobId) -> dict[str, Any]:
    """Go on from the last checkpoint."""
    return shown_job(await gateway.training.resume_job(project, job_id=job_id), project=project)


@router.get("/{job_id}/events")
async def list_events(gateway: GatewayParts, project: Project, job_id: JobId, *, after: str = "", limit: Limit = 20) -> dict[str, Any]:
    """A job's events, newest first."""
    token = _number_after(after, prefix=_event_id(job_id, ""))
    found = await gateway.training.list_events(project, job_id=job_id, page_size=limit, page_token=token)
    return page([_shown_event(event, job_id=job_id) for event in found.data], has_more=bool(found.next_page_token))


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(gateway: GatewayParts, project: Project, job_id: JobId, *, after: str = "", limit: Limit = 10) -> dict[str, Any]:
    """The adapters that a job has published, newest first."""
    token = _number_after(after, prefix=_checkpoint_id(job_id, ""))
    found = await gateway.training.list_checkpoints(project, job_id=job_id, page_size=limit, page_token=token)
    return page([_shown_checkpoint(item, job_id=job_id) for item in found.data], has_more=bool(found.next_page_token))


def shown_job(job: Job, *, project: str) -> dict[str, Any]:
    """The `fine_tuning.job` object."""
    is_final = job.state in FINAL_STATES
    succeeded = job.state == "succeeded"
    alias = model_alias(base_model=job.spec.base_model, project=project, suffix=job.suffix, job_id=job.id)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": _unix(job.create_time),
        "error": None if job.error is None else job.error.model_dump(mode="json"),
        "fine_tuned_model": alias if succeeded else None,
        "finished_at": _unix(job.finish_time),
        "hyperparameters": shown_hyperparameters(job.spec),
        "model": job.spec.base_model,
        "organization_id": project,
        "result_files": [] if job.metrics_file is None else [results_file_id(job.id)],
        "seed": job.spec.seed,
        "status": _STATUS.get(job.state, job.state),
        "trained_tokens": job.metrics.num_trained_tokens if is_final and job.metrics is not None else None,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "estimated_finish": _unix(job.estimated_finish_time),
        "integrations": [],
        "metadata": job.metadata,
        "method": shown_method(job.spec),
        "suffix": job.suffix,
        "spec": job.spec.model_dump(mode="json"),
        "deployment": job.deployment.model_dump(mode="json"),
        "metrics": None if job.metrics is None else job.metrics.model_dump(mode="json"),
    }


def _shown_event(event: JobEvent, *, job_id: str) -> dict[str, Any]:
    data: dict[str, Any] = event.data
    if event.type == "step":
        # OpenAI's names beside ours.
        data = {**data, "train_loss": data.get("loss"), "total_steps": data.get("num_steps"), "valid_loss": data.get("validation_loss")}
    return {
        "id": _event_id(job_id, event.sequence),
        "object": "fine_tuning.job.event",
        "created_at": _unix(event.create_time),
        "level": event.level if event.level in _LEVELS else "info",
        "message": event.message,
        "type": "metrics" if event.type == "step" else "message",
        "data": {**data, "finery_type": event.type, "state": event.state},
    }


def _shown_checkpoint(checkpoint: Checkpoint, *, job_id: str) -> dict[str, Any]:
    metrics = checkpoint.metrics
    return {
        "id": _checkpoint_id(job_id, checkpoint.step),
        "object": "fine_tuning.job.checkpoint",
        "created_at": _unix(checkpoint.create_time),
        "fine_tuned_model_checkpoint": checkpoint.alias,
        "fine_tuning_job_id": job_id,
        "metrics": {"step": checkpoint.step, "train_loss": metrics.loss, "full_valid_loss": metrics.validation_loss},
        "step_number": checkpoint.step,
    }


def _event_id(job_id: str, sequence: int | str) -> str:
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{sequence}"


def _checkpoint_id(job_id: str, step: int | str) -> str:
    return f"ftckpt-{job_id.removeprefix('ftjob-')}-{step}"


def _number_after(after: str, *, prefix: str) -> str:
    """The inner service's page token: the number at the end of the last id."""
    if not after:
        return ""
    number = after.removeprefix(prefix)
    if number == after or not number.isdecimal():
        raise InvalidArgumentError(f"after: got {after!r}, wanted an id such as {prefix}7", param="after")
    return number


def _unix(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp())
