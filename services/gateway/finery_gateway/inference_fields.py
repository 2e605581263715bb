"""What a request for tokens may say: an allow-list with bounds.

vLLM takes much more, some of it unsafe behind a shared door: templates, URLs to fetch, cache transfer, prompt log-probabilities. So a
field that is not here is refused by name, never passed on. What OpenAI has and no model here can do is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, StringConstraints, Tag, model_validator

from finery_common.text_forms import text_form
from finery_gateway.json_bounds import check_schema, check_size

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
MAX_INPUTS = 256
MAX_DIMENSIONS = 65_536

_NAME = text_form(r"^[A-Za-z0-9_.-]+$", "letters, digits, _ . and -")
_TOKEN_ID = text_form(r"^[0-9]{1,10}$", "a token's number as text")
Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=_NAME)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Identifier = Annotated[str, StringConstraints(max_length=512)]


def _kind(value: object) -> str:
    if not isinstance(value, list | tuple):
        return "text"
    first = cast("Sequence[object]", value)[0] if value else None
    return "tokens" if isinstance(first, int) else "lists of tokens" if isinstance(first, list | tuple) else "texts"


# Told by the first element: tried one after the other, what a prompt is not would fail at each of its elements, in every request.
Texts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[tuple[int, ...], Field(min_length=1, max_length=MAX_TOKENS), Tag("tokens")]
    | Annotated[
        tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...], Field(min_length=1, max_length=MAX_PROMPTS), Tag("lists of tokens")
    ],
    Discriminator(_kind),
]


def _refuse(reason: str) -> Callable[[object], None]:
    def check(value: object) -> None:
        if value is not None:
            raise ValueError(f"not offered; {reason}")

    return check


TextOnly = Annotated[None, BeforeValidator(_refuse("models here read and write text only; leave it out"))]
NoSearch = Annotated[None, BeforeValidator(_refuse("models here have no access to the web; leave it out"))]
NoReasoning = Annotated[None, BeforeValidator(_refuse("how long a model reasons is not adjustable here; leave it out"))]
NoPrediction = Annotated[None, BeforeValidator(_refuse("leave it out; the answer is the same without"))]
NoVerbosity = Annotated[None, BeforeValidator(_refuse("say in a message how long the answer should be"))]
NoStorage = Annotated[None, BeforeValidator(_refuse("answers are not stored here; leave it out"))]
OldFunctions = Annotated[None, BeforeValidator(_refuse("send tools and tool_choice instead"))]
OneCandidate = Annotated[None, BeforeValidator(_refuse("send n, and choose among the answers yourself"))]
NoSuffix = Annotated[None, BeforeValidator(_refuse("text is only continued at its end; leave it out"))]


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
    """One message. An answer's message can be sent back as it came, with all that is null in it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    name: Name | None = None
    refusal: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    annotations: None = None
    audio: TextOnly = None
    function_call: OldFunctions = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not self.tool_calls and self.refusal is None:
            raise ValueError("content is missing; only an assistant's message with tool_calls may do without")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("tool_call_id is missing; a tool's message answers the call of that id")
        return self


class StreamOptions(Closed):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None
    """Never padded here."""


class FunctionDefinition(Closed):
    name: Name
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        check_schema(self.parameters or {}, limit_bytes=MAX_SCHEMA_BYTES)
        return self


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
        check_schema(self.schema_, limit_bytes=MAX_SCHEMA_BYTES)
        return self


class ResponseFormat(Closed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and the field json_schema go together; send both or neither")
        return self


class RequestFields(Closed):
    """What every request has. Fields in `local_fields` end here: vLLM does not see them."""

    local_fields: ClassVar[frozenset[str]] = frozenset({"model", "user", "safety_identifier", "prompt_cache_key", "service_tier"})

    model: str = Field(min_length=1, max_length=512)
    """A base model being served, or an alias of the project."""
    user: Identifier | None = None
    """Who asks, as the next two tell: keeps a caller on one version where an alias has a canary (`caller`)."""
    safety_identifier: Identifier | None = None
    prompt_cache_key: Identifier | None = None
    service_tier: Literal["auto", "default"] | None = None
    """There is one tier."""

    @property
    def caller(self) -> str | None:
        """Who asks, as far as the body says."""
        return self.user or self.safety_identifier or self.prompt_cache_key

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of events."""
        return False

    @property
    def wants_usage(self) -> bool:
        """Whether a stream shows its usage to the client."""
        return False

    @property
    def calls_tools(self) -> bool:
        """Whether the model is to be offered tools."""
        return False

    def upstream_body(self) -> dict[str, Any]:
        """What vLLM is sent, but for `model` and `cache_salt`."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True, exclude=set(self.local_fields))


class SamplingFields(RequestFields):
    """What steers the choice of tokens in every form of generation."""

    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    ignore_eos: bool | None = None
    stop: Stop | Annotated[tuple[Stop, ...], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logit_bias: dict[Annotated[str, StringConstraints(pattern=_TOKEN_ID)], Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_LOGIT_BIAS
    )

    @property
    def streams(self) -> bool:
        return bool(self.stream)


class GenerationFields(SamplingFields):
    """What chat and plain completions share."""

    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; send stream: true with it")
        return self

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def upstream_body(self) -> dict[str, Any]:
        body = super().upstream_body()
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        return body


class ChatFields(GenerationFields):
    """The body of `POST /v1/chat/completions`."""

    local_fields: ClassVar[frozenset[str]] = RequestFields.local_fields | {"store", "modalities"}

    messages: tuple[ChatMessage, ...] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: tuple[Tool, ...] | None = Field(None, min_length=1, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    """Nothing is stored here."""
    modalities: tuple[Literal["text"]] | None = None
    metadata: NoStorage = None
    audio: TextOnly = None
    prediction: NoPrediction = None
    reasoning_effort: NoReasoning = None
    verbosity: NoVerbosity = None
    web_search_options: NoSearch = None
    functions: OldFunctions = None
    function_call: OldFunctions = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true; send both")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the old name of max_completion_tokens; send one of them")
        tools = self.tools or ()
        check_size([tool.model_dump(mode="json") for tool in tools], limit_bytes=MAX_TOOLS_BYTES)
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, NamedToolChoice) else None
        check_tools({tool.function.name for tool in tools}, choice=self.tool_choice, chosen=chosen, parallel=self.parallel_tool_calls)
        return self

    @property
    def calls_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"


class CompletionFields(GenerationFields):
    """The body of `POST /v1/completions`."""

    prompt: Texts
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: OneCandidate = None
    suffix: NoSuffix = None

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs asks for the prompt's log-probabilities, which are not offered; send one of them")
        return self


class EmbeddingFields(RequestFields):
    """The body of `POST /v1/embeddings`."""

    input: (
        Annotated[str, StringConstraints(min_length=1)]
        | Annotated[tuple[Annotated[str, StringConstraints(min_length=1)], ...], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[tuple[int, ...], Field(min_length=1, max_length=MAX_TOKENS)]
        | Annotated[tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    dimensions: int | None = Field(None, ge=1, le=MAX_DIMENSIONS)
    """Only models that were trained for it take less than their own."""
    encoding_format: Literal["float", "base64"] | None = None


def check_tools(names: set[str], *, choice: object, chosen: str | None, parallel: bool | None) -> None:
    """Raises ValueError where tool_choice or parallel_tool_calls say something of tools that are not there."""
    if not names and choice not in (None, "none", "auto"):
        raise ValueError("tool_choice is for tools; send tools with it")
    if not names and parallel is not None:
        raise ValueError("parallel_tool_calls is for tools; send tools with it")
    if chosen is not None and chosen not in names:
        raise ValueError(f"tool_choice: got {chosen!r}, wanted one of the tools: {', '.join(sorted(names))}")
