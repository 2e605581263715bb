"""`/api/v1/artifacts`: what the project has published, whoever made it, and ways to its bytes.

An artifact is addressed by the folder it lies in and its id there: `models/conv-…`, `adapters/ftjob-…-20`. It is the manifest that says
what there is, so nothing is shown that is not published. Bytes come through the gateway, or straight from the store by a URL that needs
no key and ends by itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Path, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from finery_common.artifacts import DEFAULT_LIFETIME_S, MAX_LIFETIME_S, ArtifactStore, Manifest, ObjectEntry
from finery_common.errors import InvalidArgumentError, NotFoundError
from finery_common.text_forms import text_form
from finery_gateway.context import GatewayParts, Project
from finery_gateway.files import CONTENT, chunks_of
from finery_gateway.resources import Page

_CHECKPOINT = re.compile(r"(ftjob-[0-9a-f]{24})-([0-9]{1,18})")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-")

Listed = Literal["files", "datasets", "adapters", "models"]
Collection = Literal["files", "datasets", "adapters", "models", "metrics", "checkpoints"]
"""`metrics` has a job's id, `checkpoints` (a run's state, to go on from) a job's id and a step: `ftjob-…-20`."""
_ID = text_form(r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$", "an id: at most 128 letters, digits, . _ and -, no . first")
Id = Annotated[str, Path(pattern=_ID)]
PageSize = Annotated[int, Query(ge=1, le=100)]
router = APIRouter(prefix="/api/v1/artifacts", tags=["artifacts"])


class RangeNotSatisfiableError(InvalidArgumentError):
    """A part of a file that lies behind its end."""

    http_status = 416
    default_code = "range_not_satisfiable"


class StoredArtifact(BaseModel):
    """A published artifact."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: str
    collection: Collection
    kind: str
    size_bytes: int
    """Of its files together."""
    num_files: int
    manifest_sha256: str
    made_from: dict[str, str]
    """Role -> digest of what went in, such as `dataset` and `base_model`."""
    metadata: dict[str, JsonValue]
    create_time: datetime


class UrlWish(BaseModel):
    """What a download URL is to be like."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    lifetime_s: int = Field(default=DEFAULT_LIFETIME_S, ge=1, le=MAX_LIFETIME_S, strict=True)
    """At most 7 days."""


class FileUrl(BaseModel):
    """Where one file is downloaded with no key. Whoever has the URL can read the file until it ends."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    url: str = Field(repr=False)
    expire_time: datetime
    size_bytes: int
    sha256: str


@router.get("/{collection}")
async def list_artifacts(
    gateway: GatewayParts, project: Project, collection: Listed, *, page_size: PageSize = 50, page_token: str = ""
) -> Page[StoredArtifact]:
    """What is published, in the order of the ids. A page may have fewer than were asked for though more follow."""
    root = f"projects/{project}/{collection}/"
    ids = await asyncio.to_thread(gateway.store.folders, root, after=page_token, limit=page_size)
    found = await asyncio.to_thread(_published, gateway.store, root, ids)
    data = tuple(_shown(manifest, collection=collection, artifact_id=artifact_id) for artifact_id, manifest in found)
    return Page(data=data, next_page_token=ids[-1] if len(ids) == page_size else "")


@router.get("/{collection}/{artifact_id}")
async def get_artifact(gateway: GatewayParts, project: Project, collection: Collection, artifact_id: Id) -> StoredArtifact:
    """One artifact."""
    prefix = prefix_of(project, collection, artifact_id)
    return _shown(await asyncio.to_thread(gateway.store.manifest, prefix), collection=collection, artifact_id=artifact_id)


@router.get("/{collection}/{artifact_id}/files")
async def list_artifact_files(gateway: GatewayParts, project: Project, collection: Collection, artifact_id: Id) -> tuple[ObjectEntry, ...]:
    """Its files: names, sizes in bytes, SHA-256."""
    prefix = prefix_of(project, collection, artifact_id)
    return (await asyncio.to_thread(gateway.store.manifest, prefix)).objects


@router.get("/{collection}/{artifact_id}/files/{name:path}", response_class=StreamingResponse)
async def read_artifact_file(
    gateway: GatewayParts,
    project: Project,
    collection: Collection,
    artifact_id: Id,
    name: str,
    *,
    wanted: Annotated[str, Header(alias="range")] = "",
) -> StreamingResponse:
    """One file, its digest checked on the way. `Range: bytes=N-` gives what lies behind N bytes, for a download that was broken off."""
    prefix = prefix_of(project, collection, artifact_id)
    match = _RANGE.fullmatch(wanted)
    offset = int(match[1]) if match else 0
    reader = await asyncio.to_thread(gateway.store.open, prefix, name, offset=offset)
    size_bytes = reader.entry.size_bytes
    headers = {"accept-ranges": "bytes", "etag": f'"{reader.entry.sha256}"', "content-length": str(size_bytes - offset)}
    if match is not None and offset >= size_bytes:
        reader.close()
        raise RangeNotSatisfiableError(f"range: got {wanted!r}, and {name} has {size_bytes} bytes; ask from an earlier one", param="range")
    if match is not None:
        headers["content-range"] = f"bytes {offset}-{size_bytes - 1}/{size_bytes}"
    status = 200 if match is None else 206
    return StreamingResponse(chunks_of(reader), status, media_type="application/octet-stream", headers=headers)


@router.post("/{collection}/{artifact_id}/files/{name:path}/download-url")
async def make_download_url(
    gateway: GatewayParts,
    project: Project,
    collection: Collection,
    artifact_id: Id,
    name: str,
    response: Response,
    wish: UrlWish | None = None,
) -> FileUrl:
    """A URL by which anybody downloads one file straight from the store, until it ends."""
    prefix = prefix_of(project, collection, artifact_id)
    lifetime_s = (wish or UrlWish()).lifetime_s
    file_name = await _saved_as(gateway.store, prefix, collection=collection, name=name)
    made = await asyncio.to_thread(gateway.store.download_url, prefix, name, lifetime_s=lifetime_s, file_name=file_name)
    response.headers["cache-control"] = "no-store"
    return FileUrl(url=made.url, expire_time=made.expires_at, size_bytes=made.entry.size_bytes, sha256=made.entry.sha256)


def prefix_of(project: str, collection: Collection, artifact_id: str) -> str:
    """Where an artifact of the project lies. Raises NotFoundError for an id that no checkpoint has."""
    root = f"projects/{project}/"
    if collection == "metrics":
        return f"{root}runs/{artifact_id}/metrics/"
    if collection != "checkpoints":
        return f"{root}{collection}/{artifact_id}/"
    match = _CHECKPOINT.fullmatch(artifact_id)
    if match is None:
        raise NotFoundError(f"There is no checkpoint {artifact_id!r}; name one by its job and step, as in ftjob-<24 hex digits>-20.")
    return f"{root}runs/{match[1]}/checkpoints/{match[2]}/"


async def _saved_as(store: ArtifactStore, prefix: str, *, collection: Collection, name: str) -> str | None:
    """An uploaded file's own name; any other's is that of the object."""
    if collection != "files" or name != CONTENT:
        return None
    file_name = (await asyncio.to_thread(store.manifest, prefix)).metadata.get("filename")
    return file_name if isinstance(file_name, str) else None


def _published(store: ArtifactStore, root: str, ids: Sequence[str]) -> list[tuple[str, Manifest]]:
    """Those of `ids` that have a manifest; the others are being written or deleted."""
    found: list[tuple[str, Manifest]] = []
    for artifact_id in ids:
        try:
            found.append((artifact_id, store.manifest(f"{root}{artifact_id}/")))
        except NotFoundError:
            continue
    return found


def _shown(manifest: Manifest, *, collection: Collection, artifact_id: str) -> StoredArtifact:
    return StoredArtifact(
        id=artifact_id,
        collection=collection,
        kind=manifest.kind,
        size_bytes=manifest.size_bytes,
        num_files=len(manifest.objects),
        manifest_sha256=manifest.sha256,
        made_from=manifest.made_from,
        metadata=manifest.metadata,
        create_time=manifest.created_at,
    )
