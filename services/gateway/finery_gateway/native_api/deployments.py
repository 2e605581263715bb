"""`/api/v1/deployments`: aliases and the adapters behind them. An answer's `ETag` goes back as `If-Match`, so that no flip is lost."""

from __future__ import annotations

from typing import Annotated
from uuid import uuid4

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from finery_common.errors import FailedPreconditionError, NotFoundError
from finery_common.resource_names import model_alias
from finery_gateway.client import MAX_PAGE_SIZE
from finery_gateway.context import CreateAttempt, Gateway, GatewayParts, Project
from finery_gateway.native_api.sse import event_stream
from finery_gateway.resources import Alias, Artifact, Page

PageSize = Annotated[int, Query(ge=1, le=1000)]
IfMatch = Annotated[str | None, Header()]
router = APIRouter(prefix="/api/v1/deployments", tags=["deployments"])


class DeploymentFields(BaseModel):
    """What to deploy, and under which name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    job_id: str = Field(pattern=r"^ftjob-[0-9a-f]{24}$")
    """The job whose adapter it is."""
    step: int | None = Field(None, ge=0)
    """One of the job's checkpoints; the final adapter where left out."""
    alias: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,256}$")
    """The public model name; `ft:<base>:<project>:<suffix>:<id>` of the job or checkpoint where left out."""


@router.post("", status_code=201)
async def create_deployment(
    fields: DeploymentFields,
    gateway: GatewayParts,
    project: Project,
    attempt: CreateAttempt,
    response: Response,
    *,
    if_match: IfMatch = None,
) -> Alias:
    """Roll an adapter out under an alias. Answers at once; the alias' `rollout` tells how far it is."""
    default_alias, adapter = await _adapter(gateway, project, fields)
    alias, etag = fields.alias or default_alias, _etag(if_match)

    async def create(request_id: str) -> Alias:
        return await gateway.serving.deploy(project, alias=alias, adapter=adapter, etag=etag, request_id=request_id)

    body = {**fields.model_dump(mode="json"), "etag": etag}
    made = await gateway.creates.run(project, collection="deployments", attempt=attempt, body=body, request_id=uuid4().hex, create=create)
    return _tagged(made, response)


@router.get("")
async def list_deployments(gateway: GatewayParts, project: Project, *, page_size: PageSize = 50, page_token: str = "") -> Page[Alias]:
    """The project's aliases."""
    return await gateway.serving.list_aliases(project, page_size=page_size, page_token=page_token)


@router.get("/events", response_class=StreamingResponse)
async def watch_deployments(gateway: GatewayParts, project: Project) -> StreamingResponse:
    """The present state of every alias, then each change."""
    return await event_stream(gateway.serving.watch_aliases(project))


@router.get("/{alias}")
async def get_deployment(gateway: GatewayParts, project: Project, alias: str, response: Response) -> Alias:
    """An alias as it is now."""
    return _tagged(await gateway.serving.get_alias(project, alias=alias), response)


@router.delete("/{alias}", status_code=204)
async def delete_deployment(gateway: GatewayParts, project: Project, alias: str, *, if_match: IfMatch = None) -> Response:
    """Take an alias out of serving; its adapter stays."""
    await gateway.serving.delete_alias(project, alias=alias, etag=_etag(if_match))
    return Response(status_code=204)


async def _adapter(gateway: Gateway, project: str, fields: DeploymentFields) -> tuple[str, Artifact]:
    """The default alias and the adapter of a job or of one of its checkpoints."""
    job = await gateway.training.get_job(project, job_id=fields.job_id)
    if job.model is not None:
        raise FailedPreconditionError(
            f"{job.id} has trained a whole model, no adapter; to serve it, give the catalogue an entry with s3_prefix {job.model.prefix}."
        )
    if fields.step is None:
        if job.adapter is None:
            raise FailedPreconditionError(
                f"{job.id} is {job.state} and has no final adapter; wait until it has succeeded, or name a checkpoint's step."
            )
        return model_alias(base_model=job.spec.base_model, project=project, suffix=job.suffix, job_id=job.id), job.adapter
    token, steps = "", []
    while True:
        page = await gateway.training.list_checkpoints(project, job_id=job.id, page_size=MAX_PAGE_SIZE, page_token=token)
        for checkpoint in page.data:
            if checkpoint.step == fields.step:
                return checkpoint.alias, checkpoint.adapter
            steps.append(str(checkpoint.step))
        token = page.next_page_token
        if not token:
            break
    raise NotFoundError(f"step: {job.id} has no checkpoint at step {fields.step}; it has {', '.join(steps) or 'none'}.", param="step")


def _etag(header: str | None) -> str:
    return "" if header is None or header == "*" else header.strip().removeprefix("W/").strip('"')


def _tagged(alias: Alias, response: Response) -> Alias:
    if alias.etag:
        response.headers["etag"] = f'"{alias.etag}"'
    return alias
