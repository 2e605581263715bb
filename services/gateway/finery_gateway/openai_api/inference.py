"""`/v1/chat/completions` and `/v1/completions`, for base models and aliases."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from finery_gateway.context import GatewayParts, Project
from finery_gateway.inference_fields import ChatFields, CompletionFields, GenerationFields
from finery_gateway.proxy import Generation, GenerationResponse

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"

router = APIRouter(tags=["inference"])


@router.post(CHAT_PATH)
async def create_chat_completion(fields: ChatFields, gateway: GatewayParts, project: Project) -> Response:
    """Answer a conversation, streamed or whole."""
    return GenerationResponse(gateway.proxy, _generation(fields, project=project, path=CHAT_PATH))


@router.post(COMPLETIONS_PATH)
async def create_completion(fields: CompletionFields, gateway: GatewayParts, project: Project) -> Response:
    """Go on from a text, streamed or whole."""
    return GenerationResponse(gateway.proxy, _generation(fields, project=project, path=COMPLETIONS_PATH))


def _generation(fields: GenerationFields, *, project: str, path: str) -> Generation:
    return Generation(project, fields.model, path, fields.upstream_body(), streams=bool(fields.stream), wants_usage=fields.wants_usage)
