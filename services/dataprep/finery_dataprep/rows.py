"""Rows of a training file: from one line's bytes to checked messages.

Owns the file formats, OpenAI's chat rows, its preference rows and prompt/completion rows, and what is said about a row that departs from
them. Leaves to `encoding` whatever depends on a model: its template, its tokens, its length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {
    "system": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "weight", "tool_calls"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_PAIR_KEYS = ("input", "preferred_output", "non_preferred_output")
_MAX_NESTING = 64
_HINTS = {
    "functions": "; write tools, its successor",
    "function_call": "; write tool_calls, its successor",
    "developer": "; write system",
    "text": '; write {"prompt": "", "completion": <the text>} or a chat row',
    "preferred_output": "; rows of preferences are for method dpo",
}


class RowError(Exception):
    """What is wrong with one row: `field` inside the row, such as `messages.1.content`, and what was got and wanted."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = _printable(field)
        self.description = _printable(description)


@dataclass(frozen=True)
class ToolCall:
    """A call that an assistant message makes; `arguments` are parsed JSON."""

    id: str
    name: str
    arguments: dict[str, object]


@dataclass(frozen=True)
class Message:
    """One message. `has_loss` tells an assistant message that is trained on from one that is context (`weight` 0)."""

    role: str
    content: str
    name: str | None = None
    has_loss: bool = False
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Row:
    """A conversation and the tools offered in it."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, object], ...] = ()

    def strings(self) -> Iterator[tuple[str, str]]:
        """Every text that the row's author wrote, with its field."""
        for index, message in enumerate(self.messages):
            at = f"messages.{index}"
            yield f"{at}.content", message.content
            yield f"{at}.name", message.name or ""
            yield f"{at}.tool_call_id", message.tool_call_id or ""
            for number, call in enumerate(message.tool_calls):
                for text in (call.id, call.name, *_texts(call.arguments)):
                    yield f"{at}.tool_calls.{number}", text
        for index, tool in enumerate(self.tools):
            for text in _texts(tool):
                yield f"tools.{index}", text


@dataclass(frozen=True)
class Pair:
    """A conversation with a preferred and another last message of the assistant, which alone has loss."""

    preferred: Row
    non_preferred: Row


def parse_row(line: bytes) -> Row:
    """The row that `line` holds, without its line end. Raises RowError."""
    fields = _object(_json(line), "row")
    if "messages" in fields:
        _closed(fields, ("messages", "tools"), at="")
        return Row(_messages(fields["messages"]), _tools(fields.get("tools")))
    if "prompt" in fields or "completion" in fields:
        _closed(fields, ("prompt", "completion"), at="")
        prompt = Message("user", _text(fields, "prompt", at=""))
        return Row((prompt, _learnt(Message("assistant", _text(fields, "completion", at=""), has_loss=True), at="completion")))
    got = ", ".join(fields) or "none"
    hint = next((_HINTS[key] for key in fields if key in _HINTS), "")
    raise RowError("row", f'got the keys {_short(got)}, wanted "messages", or "prompt" and "completion"{hint}')


def parse_pair(line: bytes) -> Pair:
    """The preference row that `line` holds, without its line end. Raises RowError."""
    fields = _object(_json(line), "row")
    if "messages" in fields or "prompt" in fields:
        got = ", ".join(fields)
        raise RowError("row", f"got the keys {_short(got)}, wanted {', '.join(_PAIR_KEYS)}: method dpo trains on rows of preferences")
    _closed(fields, _PAIR_KEYS, at="")
    given = _object(_present(fields, "input"), "input")
    _closed(given, ("messages", "tools", "parallel_tool_calls"), at="input")
    if not isinstance(given.get("parallel_tool_calls", True), bool):
        raise RowError("input.parallel_tool_calls", f"got {_kind(given['parallel_tool_calls'])}, wanted true or false")
    items = _list(_present(given, "messages", at="input"), "input.messages")
    if not items:
        raise RowError("input.messages", "got an empty list, wanted at least a user message")
    context = tuple(_without_loss(item, at=f"input.messages.{index}") for index, item in enumerate(items))
    tools = _tools(given.get("tools"), at="input.tools")
    preferred, other = (_output(_present(fields, key), at=key) for key in _PAIR_KEYS[1:])
    _learnt(preferred, at=f"{_PAIR_KEYS[1]}.0.content")
    if preferred == other:
        raise RowError(_PAIR_KEYS[2], "the same as preferred_output, wanted another: nothing can be learned from the pair")
    return Pair(Row((*context, preferred), tools), Row((*context, other), tools))


def _present(fields: dict[str, object], key: str, *, at: str = "") -> object:
    if key not in fields:
        raise RowError(f"{at}.{key}".lstrip("."), "missing; it is required")
    return fields[key]


def _without_loss(value: object, *, at: str) -> Message:
    if isinstance(value, dict) and "weight" in value:
        raise RowError(f"{at}.weight", "a preference row has no weights: only the outputs are trained on; remove it")
    return replace(_message(value, at=at), has_loss=False)


def _output(value: object, *, at: str) -> Message:
    items = _list(value, at)
    if len(items) != 1:
        raise RowError(at, f"got {len(items)} messages, wanted one assistant message; put what comes before it into input.messages")
    message = _without_loss(items[0], at=f"{at}.0")
    if message.role != "assistant":
        raise RowError(f"{at}.0.role", f"got {message.role!r}, wanted 'assistant'")
    return replace(message, has_loss=True)


def _json(line: bytes) -> object:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise RowError(
            "row", f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}, which is not UTF-8; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise RowError("row", "the line is blank, wanted a JSON object; remove it")
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise RowError("row", f"not JSON: {error.msg} at character {error.pos + 1}; wanted one whole JSON object on each line") from None
    except RecursionError:
        raise RowError("row", f"nested too deeply, wanted at most {_MAX_NESTING} levels") from None
    except ValueError as error:
        raise RowError("row", f"a number cannot be read: {error}") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for key, value in pairs:
        if key in fields:
            raise RowError(_short(key), "the key occurs twice in one object, wanted it once")
        fields[key] = value
    return fields


def _no_constant(name: str) -> NoReturn:
    raise RowError("row", f"got {name}, which is not JSON; wanted a finite number, a string or null")


def _messages(value: object) -> tuple[Message, ...]:
    items = _list(value, "messages")
    if not items:
        raise RowError("messages", "got an empty list, wanted at least a user and an assistant message")
    messages = tuple(_learnt(_message(item, at=f"messages.{index}"), at=f"messages.{index}.content") for index, item in enumerate(items))
    if not any(message.role == "assistant" for message in messages):
        raise RowError("messages", "no assistant message, wanted at least one: it is what the model learns to say")
    if not any(message.has_loss for message in messages):
        raise RowError("messages", "every assistant message has weight 0, wanted at least one with weight 1")
    return messages


def _message(value: object, *, at: str) -> Message:
    fields = _object(value, at)
    role = _text(fields, "role", at=at)
    if role not in ROLES:
        raise RowError(f"{at}.role", f"got {_short(role)!r}, wanted one of {', '.join(ROLES)}{_HINTS.get(role, '')}")
    _closed(fields, _MESSAGE_KEYS[role], at=at)
    calls = _tool_calls(fields.get("tool_calls"), at=f"{at}.tool_calls")
    without_content = bool(calls) and fields.get("content") is None
    return Message(
        role=role,
        content="" if without_content else _text(fields, "content", at=at),
        name=_text(fields, "name", at=at) if "name" in fields else None,
        has_loss=role == "assistant" and _weight(fields, at=at) == 1,
        tool_calls=calls,
        tool_call_id=_text(fields, "tool_call_id", at=at) if "tool_call_id" in fields else None,
    )


def _weight(fields: dict[str, object], *, at: str) -> int:
    weight = fields.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{at}.weight", f"got {_short(weight)}, wanted 0 or 1")
    return int(weight == 1)


def _tool_calls(value: object, *, at: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    items = _list(value, at)
    if not items:
        raise RowError(at, "got an empty list, wanted at least one call or no tool_calls at all")
    return tuple(_tool_call(item, at=f"{at}.{index}") for index, item in enumerate(items))


def _tool_call(value: object, *, at: str) -> ToolCall:
    fields = _object(value, at)
    _closed(fields, ("id", "type", "function"), at=at)
    _is_function(fields, at=at)
    function = _object(fields.get("function"), f"{at}.function")
    _closed(function, ("name", "arguments"), at=f"{at}.function")
    text = _text(function, "arguments", at=f"{at}.function")
    try:
        arguments = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RowError(f"{at}.function.arguments", f"got {_short(text)!r}, wanted a JSON object as a string") from None
    identifier = _text(fields, "id", at=at) if "id" in fields else ""
    return ToolCall(identifier, _text(function, "name", at=f"{at}.function"), _object(arguments, f"{at}.function.arguments"))


def _tools(value: object, *, at: str = "tools") -> tuple[dict[str, object], ...]:
    if value is None:
        return ()
    tools = tuple(_object(item, f"{at}.{index}") for index, item in enumerate(_list(value, at)))
    for index, tool in enumerate(tools):
        _check_tool(tool, at=f"{at}.{index}")
    return tools


def _check_tool(tool: dict[str, object], *, at: str) -> None:
    _closed(tool, ("type", "function"), at=at)
    _is_function(tool, at=at)
    _text(_object(tool.get("function"), f"{at}.function"), "name", at=f"{at}.function")
    for text in _texts(tool):
        _encodable(text, at)


def _is_function(fields: dict[str, object], *, at: str) -> None:
    if fields.get("type", "function") != "function":
        raise RowError(f"{at}.type", f"got {_short(fields['type'])}, wanted 'function'")


def _object(value: object, at: str) -> dict[str, object]:
    if not isinstance(value, dict):
        hint = "; a JSON array of rows has to become one row a line" if at == "row" and isinstance(value, list) else ""
        raise RowError(at, f"got {_kind(value)}, wanted an object{hint}")
    _check_nesting(value, at, _MAX_NESTING)
    return value


def _list(value: object, at: str) -> list[object]:
    if not isinstance(value, list):
        raise RowError(at, f"got {_kind(value)}, wanted a list")
    return value


def _text(fields: dict[str, object], key: str, *, at: str) -> str:
    where = f"{at}.{key}".lstrip(".")
    if key not in fields:
        raise RowError(where, "missing, wanted a string")
    value = fields[key]
    if not isinstance(value, str):
        raise RowError(where, f"got {_kind(value)}, wanted a string")
    return _encodable(value, where)


def _learnt(message: Message, *, at: str) -> Message:
    """The message; `at` is where its text is. Raises RowError where the model would learn to say nothing from it."""
    if message.has_loss and not message.content and not message.tool_calls:
        raise RowError(at, "got an empty text, wanted an answer: the model would learn to say nothing")
    return message


def _encodable(text: str, at: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError(at, "holds half of a surrogate pair (\\ud800 to \\udfff alone), wanted valid Unicode")
    return text


def _closed(fields: dict[str, object], known: tuple[str, ...], *, at: str) -> None:
    for key in fields:
        if key not in known:
            raise RowError(f"{at}.{_short(key)}".lstrip("."), f"unknown key, known are {', '.join(known)}{_HINTS.get(key, '')}")


def _check_nesting(value: object, at: str, levels: int) -> None:
    if levels == 0:
        raise RowError(at, f"nested too deeply, wanted at most {_MAX_NESTING} levels")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(item, (dict, list)):
            _check_nesting(item, at, levels - 1)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "true or false", str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _printable(text: str) -> str:
    """Errors are stored and shown: control characters and lone surrogates become escapes."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
