"""`/v1/models`: the base models being served and the project's aliases, with where they come from. Deleting one takes it out of serving."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fastapi import APIRouter

from finery_common.errors import FailedPreconditionError, NotFoundError
from finery_gateway.context import Gateway, GatewayParts, Project
from finery_gateway.openai_api.pages import page
from finery_gateway.resources import Alias, ServedBase

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def list_models(gateway: GatewayParts, project: Project) -> dict[str, Any]:
    """Every model that can be asked now."""
    bases = [_shown_base(base) for base in await gateway.serving.list_served_bases(project)]
    aliases = [_shown_alias(alias, project=project) async for alias in gateway.serving.all_aliases(project) if alias.version]
    return page([*bases, *aliases], has_more=False)


@router.get("/{model:path}")
async def retrieve_model(gateway: GatewayParts, project: Project, model: str) -> dict[str, Any]:
    """One model."""
    base = await _base(gateway, project, model)
    if base is not None:
        return _shown_base(base)
    return _shown_alias(await _alias(gateway, project, model), project=project)


@router.delete("/{model:path}")
async def delete_model(gateway: GatewayParts, project: Project, model: str) -> dict[str, Any]:
    """Take an alias out of serving; its adapter stays and can be deployed again."""
    if await _base(gateway, project, model) is not None:
        raise FailedPreconditionError(
            f"{model} is a base model, served by this installation's configuration; only an alias can be deleted."
        )
    alias = await _alias(gateway, project, model)
    await gateway.serving.delete_alias(project, alias=alias.alias)
    message = "Taken out of serving. The adapter stays: deploy it again through /api/v1/deployments."
    return {"id": model, "object": "model", "deleted": True, "message": message}


async def _base(gateway: Gateway, project: str, model: str) -> ServedBase | None:
    return next((base for base in await gateway.serving.list_served_bases(project) if base.base_model == model), None)


async def _alias(gateway: Gateway, project: str, model: str) -> Alias:
    missing = NotFoundError(
        f"There is no model {model} in this project; list models to see what there is.", param="model", code="model_not_found"
    )
    if "/" in model:
        raise missing
    try:
        return await gateway.serving.get_alias(project, alias=model)
    except NotFoundError:
        raise missing from None


def _shown_base(base: ServedBase) -> dict[str, Any]:
    started = [replica.start_time for replica in base.replicas if replica.start_time is not None]
    return {
        "id": base.base_model,
        "object": "model",
        "created": _unix(min(started, default=None)),
        "owned_by": "finery",
        "base_model": base.base_model,
        "parent": None,
        "sha256": base.base_model_sha256,
        "max_model_len": base.max_model_len,
        "ready": any(replica.ready for replica in base.replicas),
    }


def _shown_alias(alias: Alias, *, project: str) -> dict[str, Any]:
    return {
        "id": alias.alias,
        "object": "model",
        "created": _unix(alias.create_time),
        "owned_by": project,
        "base_model": alias.base_model,
        "parent": alias.base_model,
        "job_id": alias.job_id or None,
        "version": alias.version or None,
        "adapter": None if alias.adapter is None else alias.adapter.model_dump(mode="json"),
        "rollout": alias.rollout.model_dump(mode="json"),
        "ready": bool(alias.version),
    }


def _unix(time: datetime | None) -> int:
    return 0 if time is None else int(time.timestamp())
