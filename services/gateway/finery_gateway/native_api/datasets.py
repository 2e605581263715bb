"""`/api/v1/datasets`."""

from __future__ import annotations

from typing import Annotated
from uuid import uuid4

from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse

from finery_common.spec import DatasetSpec
from finery_gateway.context import CreateAttempt, GatewayParts, Project
from finery_gateway.native_api.sse import AfterSequence, event_stream
from finery_gateway.openai_api.files import require_training_file
from finery_gateway.resources import Dataset, Page

PageSize = Annotated[int, Query(ge=1, le=1000)]
router = APIRouter(prefix="/api/v1/datasets", tags=["datasets"])


@router.post("", status_code=201)
async def create_dataset(spec: DatasetSpec, gateway: GatewayParts, project: Project, attempt: CreateAttempt) -> Dataset:
    """Prepare a dataset: check, template and tokenize a file."""
    await require_training_file(gateway, project, spec.file, param="file")

    async def create(request_id: str) -> Dataset:
        return await gateway.datasets.create(project, spec=spec, request_id=request_id)

    body = spec.model_dump(mode="json")
    return await gateway.creates.run(project, collection="datasets", attempt=attempt, body=body, request_id=uuid4().hex, create=create)


@router.get("")
async def list_datasets(gateway: GatewayParts, project: Project, *, page_size: PageSize = 50, page_token: str = "") -> Page[Dataset]:
    """Datasets, newest first."""
    return await gateway.datasets.list(project, page_size=page_size, page_token=page_token)


@router.get("/{dataset_id}")
async def get_dataset(gateway: GatewayParts, project: Project, dataset_id: str) -> Dataset:
    """A dataset as it is now."""
    return await gateway.datasets.get(project, dataset_id=dataset_id)


@router.post("/{dataset_id}/cancel")
async def cancel_dataset(gateway: GatewayParts, project: Project, dataset_id: str) -> Dataset:
    """Stop preparing."""
    return await gateway.datasets.cancel(project, dataset_id=dataset_id)


@router.delete("/{dataset_id}", status_code=204)
async def delete_dataset(gateway: GatewayParts, project: Project, dataset_id: str) -> Response:
    """Delete a dataset in a final state."""
    await gateway.datasets.delete(project, dataset_id=dataset_id)
    return Response(status_code=204)


@router.get("/{dataset_id}/events", response_class=StreamingResponse)
async def watch_dataset(gateway: GatewayParts, project: Project, dataset_id: str, after_sequence: AfterSequence) -> StreamingResponse:
    """Events as they come, until the dataset is final."""
    return await event_stream(gateway.datasets.watch(project, dataset_id=dataset_id, after_sequence=after_sequence))
