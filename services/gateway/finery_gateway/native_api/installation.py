"""`/api/v1/base-models`, `/estimate`, `/replicas` and `/jobs/{id}/events`: what an installation offers, what a run would need, what is
served, and a job's live events."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from finery_common.spec import TrainingSpec
from finery_gateway.context import GatewayParts, Project
from finery_gateway.native_api.sse import AfterSequence, event_stream
from finery_gateway.resources import BaseModelEntry, ResourceEstimate, ServedBase

router = APIRouter(prefix="/api/v1", tags=["installation"])


class EstimateFields(BaseModel):
    """What is estimated."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    spec: TrainingSpec
    """As a job has it."""
    device_memory_bytes: int | None = Field(None, ge=1, strict=True)
    """A GPU with so much free memory, instead of those that are there."""


@router.get("/base-models")
async def list_base_models(gateway: GatewayParts, project: Project) -> tuple[BaseModelEntry, ...]:
    """The catalogue: what can be fine-tuned."""
    return await gateway.training.list_base_models(project)


@router.post("/estimate")
async def estimate_resources(fields: EstimateFields, gateway: GatewayParts, project: Project) -> ResourceEstimate:
    """What a run of a spec needs of a GPU, by part; nothing is loaded or created."""
    return await gateway.training.estimate_resources(project, spec=fields.spec, device_memory_bytes=fields.device_memory_bytes)


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
