"""What a model's chat template (Jinja) says of a conversation, and the conversations that other renderings are judged by.

Owns rendering as transformers does it, and the probes. Leaves what is made of the texts to `modelfile`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from finery_common.errors import InvalidArgumentError

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A model's Jinja template and the special tokens that it may name."""

    source: str
    special_tokens: Mapping[str, str]

    @classmethod
    def read(cls, model_dir: Path) -> ChatTemplate:
        """Of a model folder. Raises InvalidArgumentError where it has none, or several and none by default."""
        file = model_dir / "tokenizer_config.json"
        config = json.loads(file.read_text()) if file.is_file() else {}
        separate = model_dir / "chat_template.jinja"
        source = separate.read_text() if separate.is_file() else config.get("chat_template")
        if isinstance(source, list):
            source = next((item["template"] for item in source if item["name"] == "default"), None)
        if not source:
            raise InvalidArgumentError(f"{model_dir.name} has no chat template.", code="chat_template_missing")
        tokens = {name: token["content"] if isinstance(token := config.get(name), dict) else token for name in _SPECIAL_TOKENS}
        return cls(source=source, special_tokens={name: token for name, token in tokens.items() if token})

    def render(self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), asks: bool = True) -> str:
        """The text of `messages`, with the beginning of the model's answer where it `asks` for one.

        Raises ValueError where the template refuses the conversation.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.source,
                add_generation_prompt=asks,
                **cast("dict[str, Any]", self.special_tokens),
            )
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            raise ValueError(str(error)) from error
        return rendered[0]


def message(role: str, content: str) -> Message:
    """One of a conversation."""
    return {"role": role, "content": content}


WEATHER: Tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a <place> & its temperature.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city"}, "unit": {"type": "string", "enum": ["C", "F"]}},
            "required": ["city"],
        },
    },
}
CLOCK: Tool = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}


def tool_call(name: str, **arguments: object) -> Message:
    """An assistant's message that calls one tool."""
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


# Nothing in them is special anywhere; some of it is where escaping is done wrong.
_USER = [message("user", text) for text in ("Who are you?", 'Say "ü" {{ twice }} & <more>.', "One\n\ntwo\n  three", "{% if x %}")]
_ASSISTANT = [message("assistant", text) for text in ("I am a model.", "ü ü\n{{- not a template -}}", "Four.")]
_SYSTEM = message("system", 'Answer in "German".\nBe brief.')

PLAIN_CONVERSATIONS: Sequence[Sequence[Message]] = (
    [_USER[0]],
    [_USER[1], _ASSISTANT[0], _USER[2]],
    [_USER[0], _ASSISTANT[0], _USER[1], _ASSISTANT[1], _USER[2], _ASSISTANT[2], _USER[3]],
)
SYSTEM_CONVERSATIONS: Sequence[Sequence[Message]] = tuple([_SYSTEM, *conversation] for conversation in PLAIN_CONVERSATIONS)
_CALL = tool_call("get_weather", city="Köln", unit="C")
_ANSWER: Message = {"role": "tool", "name": "get_weather", "content": '{"degrees": 21.5}'}
TOOL_CONVERSATIONS: Sequence[tuple[Sequence[Message], Sequence[Tool]]] = (
    ([_USER[0]], [WEATHER]),
    ([_SYSTEM, _USER[0]], [WEATHER, CLOCK]),
    ([_SYSTEM, _USER[0], _CALL, _ANSWER], [WEATHER, CLOCK]),
    ([_USER[0], _CALL, _ANSWER, _ASSISTANT[0], _USER[1]], [WEATHER]),
)
# Some models call one tool at a time; the others' templates are held to this too.
SEVERAL_CALLS: Sequence[Message] = (
    _SYSTEM,
    _USER[0],
    {**_CALL, "content": "Let me see.", "tool_calls": [*_CALL["tool_calls"], *tool_call("get_time", zone="CET")["tool_calls"]]},
    _ANSWER,
    {"role": "tool", "name": "get_time", "content": "It is noon."},
    _ASSISTANT[0],
    _USER[1],
)
