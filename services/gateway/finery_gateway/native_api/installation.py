"""`/api/v1/base-models`, `/api/v1/replicas` and `/api/v1/jobs/{id}/events`: what an installation offers, runs, and a job's live events."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse

from finery_gateway.context import GatewayParts, Project
from finery_gateway.native_api.sse import AfterSequence, event_stream
from finery_gateway.resources import BaseModelEntry, ServedBase

router = APIRouter(prefix="/api/v1", tags=["installation"])


@router.get("/base-models")
async def list_base_models(gateway: GatewayParts, project: Project) -> tuple[BaseModelEntry, ...]:
    """The catalogue: what can be fine-tuned."""
    return await gateway.training.list_base_models(project)


@router.get("/replicas")
async def list_replicas(gateway: GatewayParts, project: Project) -> tuple[ServedBase, ...]:
    """The base models being served, each with its vLLM replicas."""
    return await gateway.serving.list_served_bases(project)


@router.get("/jobs/{job_id}/events", response_class=StreamingResponse)
async def watch_job(gateway: GatewayParts, project: Project, job_id: str, after_sequence: AfterSequence) -> StreamingResponse:
    """A fine-tuning job's events as they come, until the job and its deployment are final."""
    return await event_stream(gateway.training.watch_job(project, job_id=job_id, after_sequence=after_sequence))


@router.delete("/jobs/{job_id}", status_code=204)
async def delete_job(gateway: GatewayParts, project: Project, job_id: str) -> Response:
    """Delete a final job's checkpoints, adapters and results; refused while one of them is deployed."""
    await gateway.training.delete_job(project, job_id=job_id)
    return Response(status_code=204)
