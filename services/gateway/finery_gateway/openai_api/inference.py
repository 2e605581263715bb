"""`/v1/chat/completions`, `/v1/completions`, `/v1/responses` and `/v1/embeddings`, for base models and aliases."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import Response

from finery_common.errors import NotFoundError
from finery_common.resource_names import is_resource_id
from finery_gateway.context import GatewayParts, Project
from finery_gateway.inference_fields import ChatFields, CompletionFields, EmbeddingFields, RequestFields
from finery_gateway.proxy import CHAT_PATH, COMPLETIONS_PATH, EMBEDDINGS_PATH, RESPONSES_PATH, Generation, GenerationResponse
from finery_gateway.responses_fields import ResponsesFields
from finery_gateway.splits import new_key

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


@router.post(RESPONSES_PATH)
async def create_response(fields: ResponsesFields, gateway: GatewayParts, project: Project, *, sticky: Sticky = None) -> Response:
    """Answer a conversation in OpenAI's newer form, streamed or whole. Nothing is stored: send all of it every time."""
    return GenerationResponse(gateway.proxy, _generation(fields, project=project, path=RESPONSES_PATH, sticky=sticky))


@router.post(EMBEDDINGS_PATH)
async def create_embedding(fields: EmbeddingFields, gateway: GatewayParts, project: Project) -> Response:
    """Turn texts into vectors, where the model is one that does."""
    return GenerationResponse(gateway.proxy, _generation(fields, project=project, path=EMBEDDINGS_PATH))


def _generation(fields: RequestFields, *, project: str, path: str, sticky: str | None = None) -> Generation:
    if not is_resource_id(fields.model):
        raise NotFoundError(f"There is no model {fields.model!r}; list models to see what there is.", param="model", code="model_not_found")
    return Generation(
        project,
        fields.model,
        path,
        fields.upstream_body(),
        streams=fields.streams,
        wants_usage=fields.wants_usage,
        calls_tools=fields.calls_tools,
        sticky_key=sticky or fields.caller or new_key(),
    )
