"""`/api/v1/deployments`: aliases, the adapters behind them, and what is decided of a canary.

An answer's `ETag` goes back as `If-Match`, so that no change is lost.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol
from uuid import uuid4

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from finery_common.errors import FailedPreconditionError, NotFoundError
from finery_common.resource_names import model_alias
from finery_common.text_forms import JOB_ID, text_form
from finery_gateway.client import MAX_PAGE_SIZE
from finery_gateway.context import CreateAttempt, Gateway, GatewayParts, Project
from finery_gateway.creates import Attempt
from finery_gateway.native_api.sse import event_stream
from finery_gateway.resources import Alias, Artifact, Page, RouteTarget
from finery_gateway.splits import targets_of
from finery_gateway.version_reports import VersionReport

PageSize = Annotated[int, Query(ge=1, le=1000)]
IfMatch = Annotated[str | None, Header()]
router = APIRouter(prefix="/api/v1/deployments", tags=["deployments"])
_ALIAS = text_form(r"^[A-Za-z0-9._:-]{1,256}$", "at most 256 letters, digits, . _ : and -")


class DeploymentFields(BaseModel):
    """What to deploy, and under which name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    job_id: str = Field(pattern=JOB_ID)
    """The job whose adapter it is."""
    step: int | None = Field(None, ge=0)
    """One of the job's checkpoints; the final adapter where left out."""
    alias: str | None = Field(None, pattern=_ALIAS)
    """The public model name; `ft:<base>:<project>:<suffix>:<id>` of the job or checkpoint where left out."""
    canary_weight: int | None = Field(None, ge=1, le=99)
    """Percent of the alias' requests that it shall answer beside what serves; the whole alias where left out."""


class CanaryFields(BaseModel):
    """How much a canary answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weight: int = Field(ge=1, le=99)
    """Percent of the alias' requests."""


class VersionCounts(BaseModel):
    """What one version of an alias has done since this process started; means are in seconds, none before the first answer."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    version: str
    role: Literal["serving", "canary"]
    weight: int
    """Percent of the alias' requests."""
    answered: int
    refused: int
    """The request's own fault."""
    failed: int
    cancelled: int
    """By a client that left."""
    prompt_tokens: int
    completion_tokens: int
    mean_first_byte_seconds: float | None
    mean_request_seconds: float | None


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
        return await gateway.serving.deploy(
            project, alias=alias, adapter=adapter, etag=etag, request_id=request_id, canary_weight=fields.canary_weight
        )

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


@router.get("/{alias}/versions")
async def compare_versions(gateway: GatewayParts, project: Project, alias: str) -> tuple[VersionCounts, ...]:
    """The version that serves and its canary beside each other, as this process of the gateway has counted since it started.

    `finery_gateway_version_*` in Prometheus has the counts of all processes.
    """
    targets = targets_of(await gateway.serving.get_alias(project, alias=alias))
    reports = [gateway.proxy.reports.peek(project, alias, target.version) for target in targets]
    return tuple(_counts(*item) for item in zip(("serving", "canary"), targets, reports, strict=False) if item[1].version)


@router.post("/{alias}/canary")
async def set_canary_weight(
    gateway: GatewayParts, project: Project, alias: str, fields: CanaryFields, response: Response, *, if_match: IfMatch = None
) -> Alias:
    """Change the share of requests that the canary answers."""
    changed = await gateway.serving.set_canary_weight(project, alias=alias, weight=fields.weight, etag=_etag(if_match))
    return _tagged(changed, response)


@router.post("/{alias}/promote")
async def promote(
    gateway: GatewayParts, project: Project, alias: str, attempt: CreateAttempt, response: Response, *, if_match: IfMatch = None
) -> Alias:
    """Give the canary the whole alias, at once."""
    return _tagged(await _once(gateway, project, alias, gateway.serving.promote, attempt=attempt, if_match=if_match), response)


@router.post("/{alias}/rollback")
async def roll_back(
    gateway: GatewayParts, project: Project, alias: str, attempt: CreateAttempt, response: Response, *, if_match: IfMatch = None
) -> Alias:
    """Drop the canary or the rollout under way; without either, roll the version out that served before."""
    return _tagged(await _once(gateway, project, alias, gateway.serving.roll_back, attempt=attempt, if_match=if_match), response)


@router.post("/{alias}/pin")
async def pin(gateway: GatewayParts, project: Project, alias: str, response: Response) -> Alias:
    """Keep the version that serves loaded, whatever else is asked for."""
    return _tagged(await gateway.serving.pin(project, alias=alias), response)


@router.post("/{alias}/unpin")
async def unpin(gateway: GatewayParts, project: Project, alias: str, response: Response) -> Alias:
    """Let the version make room again."""
    return _tagged(await gateway.serving.unpin(project, alias=alias), response)


@router.delete("/{alias}", status_code=204)
async def delete_deployment(gateway: GatewayParts, project: Project, alias: str, *, if_match: IfMatch = None) -> Response:
    """Take an alias out of serving; its adapter stays."""
    await gateway.serving.delete_alias(project, alias=alias, etag=_etag(if_match))
    return Response(status_code=204)


class _Change(Protocol):
    """A call of serving's that changes an alias once for each request id."""

    __name__: str

    async def __call__(self, project: str, *, alias: str, etag: str, request_id: str) -> Alias: ...


async def _once(gateway: Gateway, project: str, alias: str, change: _Change, *, attempt: Attempt, if_match: str | None) -> Alias:
    """Makes the change, or answers as for the first time where the request repeats one."""
    etag = _etag(if_match)

    async def create(request_id: str) -> Alias:
        return await change(project, alias=alias, etag=etag, request_id=request_id)

    collection, body = f"deployments.{change.__name__}", {"alias": alias, "etag": etag}
    return await gateway.creates.run(project, collection=collection, attempt=attempt, body=body, request_id=uuid4().hex, create=create)


def _counts(role: Literal["serving", "canary"], target: RouteTarget, report: VersionReport) -> VersionCounts:
    return VersionCounts(
        version=target.version,
        role=role,
        weight=target.weight,
        **report.requests,
        prompt_tokens=report.prompt_tokens,
        completion_tokens=report.completion_tokens,
        mean_first_byte_seconds=report.first_byte.mean_s,
        mean_request_seconds=report.whole.mean_s,
    )


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
