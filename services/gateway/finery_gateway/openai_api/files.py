"""`/v1/files`. A job's results file is here too, under `file-<hex>` of the job `ftjob-<hex>`; it lives and dies with its job."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse

from finery_common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from finery_common.text_forms import FILE_ID
from finery_gateway.context import CreateAttempt, Gateway, GatewayParts, Project
from finery_gateway.files import PURPOSE, StoredFile, no_file, open_object
from finery_gateway.multipart import FormReader
from finery_gateway.openai_api.pages import page
from finery_gateway.resources import Job

RESULTS_PURPOSE = "fine-tune-results"
MAX_LIMIT = 10_000
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": [PURPOSE]}},
}

FileId = Annotated[str, Path(pattern=FILE_ID)]
router = APIRouter(prefix="/v1/files", tags=["files"])


def results_file_id(job_id: str) -> str:
    """The id under which a job's CSV of step metrics is found."""
    return f"file-{job_id.removeprefix('ftjob-')}"


@router.post("", openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}})
async def create_file(request: Request, gateway: GatewayParts, project: Project, attempt: CreateAttempt) -> dict[str, Any]:
    """Upload a file for fine-tuning."""
    form = FormReader(request.stream(), content_type=request.headers.get("content-type", ""), file_limit_bytes=gateway.files.limit_bytes)
    return _shown(await gateway.files.create(project, form=form, attempt=attempt))


@router.get("")
async def list_files(
    gateway: GatewayParts,
    project: Project,
    *,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = MAX_LIMIT,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """List uploaded files. Results files are listed by their jobs."""
    found = await gateway.files.list(project, after=after, limit=limit, order=order, purpose=purpose)
    return page([_shown(file) for file in found.files], has_more=found.has_more)


@router.get("/{file_id}")
async def retrieve_file(gateway: GatewayParts, project: Project, file_id: FileId) -> dict[str, Any]:
    """A file's metadata."""
    try:
        return _shown(await gateway.files.get(project, file_id=file_id))
    except NotFoundError:
        return _results_shown(await _job_with_results(gateway, project, file_id))


@router.get("/{file_id}/content")
async def retrieve_content(gateway: GatewayParts, project: Project, file_id: FileId) -> StreamingResponse:
    """A file's content."""
    try:
        file = await gateway.files.get(project, file_id=file_id)
        chunks, size_bytes, media_type = await gateway.files.open(project, file_id=file_id), file.size_bytes, "application/octet-stream"
    except NotFoundError:
        job = await _job_with_results(gateway, project, file_id)
        assert job.metrics_file is not None
        manifest = await asyncio.to_thread(gateway.store.manifest, job.metrics_file.prefix)
        chunks = await open_object(gateway.store, prefix=job.metrics_file.prefix, name=manifest.objects[0].name)
        size_bytes, media_type = manifest.size_bytes, "text/csv"
    return StreamingResponse(chunks, media_type=media_type, headers={"content-length": str(size_bytes)})


@router.delete("/{file_id}")
async def delete_file(gateway: GatewayParts, project: Project, file_id: FileId) -> dict[str, Any]:
    """Delete a file; refused while a job or a dataset being made needs it."""
    try:
        await gateway.files.delete(project, file_id=file_id, users=lambda: gateway.file_users(project, file_id))
    except NotFoundError:
        job = await _job_with_results(gateway, project, file_id)
        raise FailedPreconditionError(f"{file_id} holds the results of {job.id} and goes when that job is deleted.") from None
    return {"id": file_id, "object": "file", "deleted": True}


async def require_training_file(gateway: Gateway, project: str, file_id: str, *, param: str) -> None:
    """Raises NotFoundError, or InvalidArgumentError for a file that is there for something else."""
    try:
        file = await gateway.files.get(project, file_id=file_id)
    except NotFoundError:
        raise no_file(file_id, param=param) from None
    if file.purpose != PURPOSE:
        raise InvalidArgumentError(f"{param}: {file_id} was uploaded with purpose {file.purpose!r}, wanted {PURPOSE!r}", param=param)


async def _job_with_results(gateway: Gateway, project: str, file_id: str) -> Job:
    try:
        job = await gateway.training.get_job(project, job_id=f"ftjob-{file_id.removeprefix('file-')}")
    except NotFoundError:
        raise no_file(file_id) from None
    if job.metrics_file is None:
        raise no_file(file_id)
    return job


def _shown(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }


def _results_shown(job: Job) -> dict[str, Any]:
    assert job.metrics_file is not None
    return {
        "id": results_file_id(job.id),
        "object": "file",
        "bytes": job.metrics_file.size_bytes,
        "created_at": int((job.finish_time or job.create_time).timestamp()),
        "filename": f"{job.id}-step-metrics.csv",
        "purpose": RESULTS_PURPOSE,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
