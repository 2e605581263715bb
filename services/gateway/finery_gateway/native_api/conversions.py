"""`/api/v1/conversions`."""

from __future__ import annotations

import asyncio
from typing import Annotated
from uuid import uuid4

from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse

from finery_common.artifacts import Manifest, ObjectEntry
from finery_common.conversion_spec import ConversionSpec
from finery_common.errors import FailedPreconditionError, NotFoundError
from finery_gateway.context import CreateAttempt, Gateway, GatewayParts, Project
from finery_gateway.files import open_object
from finery_gateway.native_api.sse import AfterSequence, event_stream
from finery_gateway.resources import Conversion, Page

PageSize = Annotated[int, Query(ge=1, le=1000)]
router = APIRouter(prefix="/api/v1/conversions", tags=["conversions"])


@router.post("", status_code=201)
async def create_conversion(spec: ConversionSpec, gateway: GatewayParts, project: Project, attempt: CreateAttempt) -> Conversion:
    """Merge an adapter and write it in another format."""

    async def create(request_id: str) -> Conversion:
        return await gateway.conversions.create(project, spec=spec, request_id=request_id)

    body = spec.model_dump(mode="json")
    return await gateway.creates.run(project, collection="conversions", attempt=attempt, body=body, request_id=uuid4().hex, create=create)


@router.get("")
async def list_conversions(gateway: GatewayParts, project: Project, *, page_size: PageSize = 50, page_token: str = "") -> Page[Conversion]:
    """Conversions, newest first, without their reports."""
    page = await gateway.conversions.list(project, page_size=page_size, page_token=page_token)
    return page.model_copy(update={"data": tuple(item.model_copy(update={"report": None}) for item in page.data)})


@router.get("/{conversion_id}")
async def get_conversion(gateway: GatewayParts, project: Project, conversion_id: str) -> Conversion:
    """A conversion as it is now."""
    return await gateway.conversions.get(project, conversion_id=conversion_id)


@router.get("/{conversion_id}/files")
async def list_files(gateway: GatewayParts, project: Project, conversion_id: str) -> tuple[ObjectEntry, ...]:
    """What a conversion has published: names, sizes in bytes, SHA-256."""
    return (await _manifest(gateway, project, conversion_id))[1].objects


@router.get("/{conversion_id}/files/{name:path}", response_class=StreamingResponse)
async def read_file(gateway: GatewayParts, project: Project, conversion_id: str, name: str) -> StreamingResponse:
    """One file of a conversion, its digest checked on the way."""
    prefix, manifest = await _manifest(gateway, project, conversion_id)
    entry = manifest.entry(name)
    if entry is None:
        known = ", ".join(item.name for item in manifest.objects)
        raise NotFoundError(f"{conversion_id} has no file {name!r}; it has {known}.")
    chunks = await open_object(gateway.store, prefix=prefix, name=name)
    return StreamingResponse(chunks, media_type="application/octet-stream", headers={"content-length": str(entry.size_bytes)})


@router.post("/{conversion_id}/cancel")
async def cancel_conversion(gateway: GatewayParts, project: Project, conversion_id: str) -> Conversion:
    """Stop converting."""
    return await gateway.conversions.cancel(project, conversion_id=conversion_id)


@router.delete("/{conversion_id}", status_code=204)
async def delete_conversion(gateway: GatewayParts, project: Project, conversion_id: str) -> Response:
    """Delete a final conversion and what it published."""
    await gateway.conversions.delete(project, conversion_id=conversion_id)
    return Response(status_code=204)


@router.get("/{conversion_id}/events", response_class=StreamingResponse)
async def watch_conversion(gateway: GatewayParts, project: Project, conversion_id: str, after_sequence: AfterSequence) -> StreamingResponse:
    """Events as they come, until the conversion is final."""
    return await event_stream(gateway.conversions.watch(project, conversion_id=conversion_id, after_sequence=after_sequence))


async def _manifest(gateway: Gateway, project: str, conversion_id: str) -> tuple[str, Manifest]:
    """Where a conversion's files are, and which. Raises FailedPreconditionError where it has published none."""
    conversion = await gateway.conversions.get(project, conversion_id=conversion_id)
    if conversion.artifact is None:
        raise FailedPreconditionError(f"{conversion_id} is {conversion.state} and has no files; wait until it has succeeded.")
    prefix = conversion.artifact.prefix
    return prefix, await asyncio.to_thread(gateway.store.manifest, prefix)
