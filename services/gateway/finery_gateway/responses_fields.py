"""What a request to `/v1/responses` may say: the allow-list of `inference_fields` for OpenAI's newer form.

Stateless: every answer is forgotten once it is sent, so no project can reach another's. A conversation is carried on by sending its items
again.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, StringConstraints, Tag, model_validator

from finery_gateway.inference_fields import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_SCHEMA_BYTES,
    MAX_TOKENS,
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
    Closed,
    FunctionDefinition,
    Name,
    NamedFunction,
    NoReasoning,
    RequestFields,
    SamplingFields,
    check_tools,
)
from finery_gateway.json_bounds import check_schema, check_size

MAX_METADATA = 16
_LOGPROBS = "message.output_text.logprobs"


def _stateless(value: object) -> None:
    if value is not None:
        raise ValueError("not offered; answers are not stored here: send the whole conversation in input")


def _foreground(value: object) -> bool | None:
    if value:
        raise ValueError("not offered; answers are not stored here: wait for it, or stream")
    return None if value is None else False


def _no_built_ins(value: object) -> None:
    if value is not None:
        raise ValueError("not offered; it bounds built-in tools, of which there are none here: leave it out")


Stateless = Annotated[None, BeforeValidator(_stateless)]
NoBuiltIns = Annotated[None, BeforeValidator(_no_built_ins)]
ItemId = Annotated[str, StringConstraints(max_length=128)]
Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Closed):
    type: Literal["input_text"]
    text: str


class OutputText(Closed):
    """Text of an earlier answer, as it came."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[tuple[JsonValue, ...], Field(max_length=0)] | None = None
    logprobs: JsonValue = Field(None, exclude=True)
    """Of an earlier answer; of no effect."""


class InputMessage(Closed):
    """A message. One that an answer brought can be sent back as it came."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | tuple[Annotated[InputText | OutputText, Field(discriminator="type")], ...]
    id: ItemId | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = Field(None, exclude=True)


class FunctionCallItem(Closed):
    type: Literal["function_call"]
    call_id: ItemId
    name: Name
    arguments: str
    id: ItemId | None = None
    status: Status | None = None
    namespace: None = None
    caller: None = None


class FunctionOutputItem(Closed):
    type: Literal["function_call_output"]
    call_id: ItemId
    output: str
    id: ItemId | None = None
    status: Status | None = None


class FunctionTool(FunctionDefinition):
    type: Literal["function"]


class FunctionChoice(NamedFunction):
    type: Literal["function"]


class TextFormat(Closed):
    """As `response_format` of chat completions, but flat."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        is_schema = self.type == "json_schema"
        if is_schema != (self.schema_ is not None) or is_schema != (self.name is not None):
            raise ValueError("type json_schema goes with name and schema; send all three or none")
        check_schema(self.schema_ or {}, limit_bytes=MAX_SCHEMA_BYTES)
        return self


class TextConfig(Closed):
    format: TextFormat | None = None
    verbosity: None = None


class StreamFlags(Closed):
    include_obfuscation: Literal[False] | None = None
    """Never padded here."""


def _kind_of(item: object) -> str:
    """A message need not say that it is one."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(
        _kind_of,
        custom_error_type="item_type",
        custom_error_message="wanted an item of type message, function_call or function_call_output",
    ),
]


class ResponsesFields(SamplingFields):
    """The body of `POST /v1/responses`."""

    local_fields: ClassVar[frozenset[str]] = RequestFields.local_fields | {"store", "background", "stream_options"}

    input: str | Annotated[tuple[InputItem, ...], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    metadata: dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]] | None = Field(
        None, max_length=MAX_METADATA
    )
    """Comes back with the answer."""
    stream_options: StreamFlags | None = None
    text: TextConfig | None = None
    tools: tuple[FunctionTool, ...] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    include: tuple[Literal["message.output_text.logprobs"], ...] | None = Field(None, max_length=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncation: Literal["auto", "disabled"] | None = None
    store: Literal[False] | None = None
    """Nothing is stored here."""
    background: Annotated[bool | None, BeforeValidator(_foreground)] = None
    previous_response_id: Stateless = None
    conversation: Stateless = None
    prompt: Stateless = None
    reasoning: NoReasoning = None
    max_tool_calls: NoBuiltIns = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.include:
            raise ValueError(f'top_logprobs goes with include: ["{_LOGPROBS}"]; send both')
        tools = self.tools or ()
        check_size([tool.model_dump(mode="json") for tool in tools], limit_bytes=MAX_TOOLS_BYTES)
        chosen = self.tool_choice.name if isinstance(self.tool_choice, FunctionChoice) else None
        check_tools({tool.name for tool in tools}, choice=self.tool_choice, chosen=chosen, parallel=self.parallel_tool_calls)
        return self

    @property
    def wants_usage(self) -> bool:
        return True

    @property
    def calls_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    def upstream_body(self) -> dict[str, Any]:
        # vLLM would keep the answer where its environment says so.
        return super().upstream_body() | {"store": False}
