"""What a request for tokens may say: an allow-list with bounds.

vLLM takes much more, some of it unsafe behind a shared door: templates, URLs to fetch, cache transfer, prompt log-probabilities. So a
field that is not here is refused by name, never passed on.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, model_validator

MAX_CHOICES = 8
MAX_TOKENS = 1_048_576
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_LOGIT_BIAS = 300
MAX_SCHEMA_BYTES = 32 * 1024
MAX_TOOLS = 64
MAX_TOOLS_BYTES = 64 * 1024
MAX_PROMPTS = 32
MAX_MESSAGES = 4096

Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Closed(BaseModel):
    """A JSON object whose every field is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class TextPart(Closed):
    type: Literal["text"]
    text: str


class FunctionCall(Closed):
    name: Name
    arguments: str


class ToolCall(Closed):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Closed):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    name: Name | None = None
    refusal: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not self.tool_calls and self.refusal is None:
            raise ValueError("content is missing; only an assistant's message with tool_calls may do without")
        return self


class StreamOptions(Closed):
    include_usage: bool = False


class FunctionDefinition(Closed):
    name: Name
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Closed):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Closed):
    name: Name


class NamedToolChoice(Closed):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Closed):
    name: Name
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        _bound(self.schema_, limit_bytes=MAX_SCHEMA_BYTES)
        return self


class ResponseFormat(Closed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationFields(Closed):
    """What chat and plain completions share."""

    model: str = Field(min_length=1, max_length=512)
    """A base model being served, or an alias of the project."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    ignore_eos: bool | None = None
    stop: Stop | Annotated[tuple[Stop, ...], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logit_bias: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_LOGIT_BIAS
    )
    user: str | None = Field(None, max_length=512)
    """Keeps a caller on one version where an alias has a canary, unless the header `x-finery-sticky` does."""

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; send stream: true with it")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether the client asked for the usage event of a stream."""
        return self.stream_options is not None and self.stream_options.include_usage

    def upstream_body(self) -> dict[str, Any]:
        """What vLLM is sent, but for `model` and `cache_salt`."""
        body = self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"user", "model"})
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        return {key: value for key, value in body.items() if value is not None}


class ChatFields(GenerationFields):
    """The body of `POST /v1/chat/completions`."""

    messages: tuple[ChatMessage, ...] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: tuple[Tool, ...] | None = Field(None, min_length=1, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _tools_are_bounded(self) -> Self:
        _bound([tool.model_dump(mode="json") for tool in self.tools or ()], limit_bytes=MAX_TOOLS_BYTES)
        return self


class CompletionFields(GenerationFields):
    """The body of `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[tuple[int, ...], Field(min_length=1, max_length=MAX_TOKENS)]
        | Annotated[tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs asks for the prompt's log-probabilities, which are not offered; send one of them")
        return self


def _bound(value: Any, *, limit_bytes: int) -> None:
    size_bytes = len(json.dumps(value))
    if size_bytes > limit_bytes:
        raise ValueError(f"got {size_bytes} bytes of JSON, wanted at most {limit_bytes}")
