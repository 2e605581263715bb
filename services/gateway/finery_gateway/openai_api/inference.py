"""`/v1/chat/completions` and `/v1/completions`, for base models and aliases."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import Response

from finery_gateway.context import GatewayParts, Project
from finery_gateway.inference_fields import ChatFields, CompletionFields, GenerationFields
from finery_gateway.proxy import Generation, GenerationResponse
from finery_gateway.splits import new_key

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"

Sticky = Annotated[str | None, Header(alias="x-finery-sticky", max_length=512)]

router = APIRouter(tags=["inference"])


@router.post(CHAT_PATH)
async def create_chat_completion(fields: ChatFields, gateway: GatewayParts, project: Project, *, sticky: Sticky = None) -> Response:
    """Answer a conversation, streamed or whole. Where the model has a canary, requests of one `x-finery-sticky` stay on one version."""
    return GenerationResponse(gateway.proxy, _generation(fields, project=project, path=CHAT_PATH, sticky=sticky))


@router.post(COMPLETIONS_PATH)
async def create_completion(fields: CompletionFields, gateway: GatewayParts, project: Project, *, sticky: Sticky = None) -> Response:
    """Go on from a text, streamed or whole. Where the model has a canary, requests of one `x-finery-sticky` stay on one version."""
    return GenerationResponse(gateway.proxy, _generation(fields, project=project, path=COMPLETIONS_PATH, sticky=sticky))


def _generation(fields: GenerationFields, *, project: str, path: str, sticky: str | None) -> Generation:
    return Generation(
        project,
        fields.model,
        path,
        fields.upstream_body(),
        streams=bool(fields.stream),
        wants_usage=fields.wants_usage,
        sticky_key=sticky or fields.user or new_key(),
    )
