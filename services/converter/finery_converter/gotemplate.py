"""The part of Go's text/template that Ollama's templates of ours are written in, executed in Python.

Owns parsing and executing it with Go's rules of truth, printing and scope, on the values that Ollama gives a template (`ollama_values`).
What it does not know it refuses; it never guesses. Knows nothing of models.

Known: text, trim markers, comments; if, else if, else, range with one or two variables, with, end; fields, variables, string, number and
boolean constants, parentheses; and, or, not, eq, ne, lt, le, gt, ge, len, slice, index, json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{(?:(-)(?=\s))?(.*?)(?:(?<=\s)(-))?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)|(?P<number>-?\d+)|(?P<field>\.[A-Za-z_]\w*)|(?P<dot>\.)"""
    r"""|(?P<variable>\$\w*)|(?P<word>[A-Za-z_]\w*)|(?P<punctuation>:=|[(),=|]))"""
)
_BLOCKS = ("if", "range", "with")


class TemplateError(Exception):
    """Outside of what is known here, or an error in Go as well."""


@dataclass
class _Node:
    """`kind`: text, print, set, if, range or with. A chain of else ifs is a list of one node in `otherwise`."""

    kind: str
    text: str = ""
    expression: Any = None
    names: tuple[str, ...] = ()
    body: list[_Node] = field(default_factory=list["_Node"])
    otherwise: list[_Node] = field(default_factory=list["_Node"])


class GoTemplate:
    """A parsed template. Raises TemplateError where it holds anything else than what is known here."""

    def __init__(self, source: str) -> None:
        pieces = list(_pieces(source))
        self._nodes, rest = _block(pieces, 0, depth=0)
        assert rest == len(pieces)

    def execute(self, values: Mapping[str, Any]) -> str:
        """The text that Go would write for `values` (see `ollama_values`)."""
        out: list[str] = []
        _run(self._nodes, _Scope([{"$": values}]), values, out)
        return "".join(out)


def _pieces(source: str) -> Iterator[tuple[str, str]]:
    """("text", …) and ("action", …), with white space trimmed as the markers say."""
    position, trim_next = 0, False
    for found in _ACTION.finditer(source):
        text = source[position : found.start()]
        text = text.lstrip(" \t\r\n") if trim_next else text
        text = text.rstrip(" \t\r\n") if found[1] else text
        if text:
            yield "text", text
        content = found[2].strip()
        if not content.startswith("/*"):
            yield "action", content
        position, trim_next = found.end(), bool(found[3])
    text = source[position:].lstrip(" \t\r\n") if trim_next else source[position:]
    if "{{" in text:
        raise TemplateError("an action is not closed")
    if text:
        yield "text", text


def _block(pieces: Sequence[tuple[str, str]], index: int, *, depth: int) -> tuple[list[_Node], int]:
    """Nodes up to this block's `else` or `end`, and that one's place."""
    nodes: list[_Node] = []
    while index < len(pieces):
        kind, content = pieces[index]
        word = content.split(None, 1)[0] if kind == "action" and content else ""
        if word in ("else", "end"):
            if depth == 0:
                raise TemplateError(f"unexpected {word}")
            return nodes, index
        if kind == "text":
            nodes.append(_Node("text", text=content))
        elif word in _BLOCKS:
            node, index = _branch(pieces, index, word, content[len(word) :], depth=depth)
            nodes.append(node)
        else:
            nodes.append(_action(content))
        index += 1
    if depth:
        raise TemplateError("a block has no end")
    return nodes, index


def _branch(pieces: Sequence[tuple[str, str]], index: int, word: str, header: str, *, depth: int) -> tuple[_Node, int]:
    """One if, range or with, and the place of its `end`."""
    names, expression = _declaration(_tokens(header))
    node = _Node(word, names=names, expression=expression)
    node.body, index = _block(pieces, index + 1, depth=depth + 1)
    content = pieces[index][1]
    if content == "else":
        node.otherwise, index = _block(pieces, index + 1, depth=depth + 1)
        if pieces[index][1] != "end":
            raise TemplateError("expected end after else")
    elif content.startswith("else"):
        inner = content[4:].strip()
        if word != "if" or not inner.startswith("if "):
            raise TemplateError(f"unknown: {content}")
        nested, index = _branch(pieces, index, "if", inner[2:], depth=depth)
        node.otherwise = [nested]
    return node, index


def _action(content: str) -> _Node:
    tokens = _tokens(content)
    names, expression = _declaration(tokens)
    if names:
        return _Node("set", names=names, expression=expression, text="=" if ("punctuation", "=") in tokens[:2] else ":=")
    return _Node("print", expression=expression)


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    position, text = 0, text.strip()
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise TemplateError(f"unknown: {text[position:]!r}")
        kind = str(found.lastgroup)
        token = found[kind]
        # `.A.B` and `$x.A` are one operand; a field after white space is one of its own.
        attached = kind == "field" and tokens and found.start() == found.start(kind) and position > 0
        if attached and tokens[-1][0] in ("field", "variable"):
            tokens[-1] = (tokens[-1][0], tokens[-1][1] + token)
        else:
            tokens.append((kind, token))
        position = found.end()
    return tokens


def _declaration(tokens: list[tuple[str, str]]) -> tuple[tuple[str, ...], Any]:
    """The variables that are set, and the expression. `$i, $x := …`, `$x = …` or an expression alone."""
    sign = next((index for index, token in enumerate(tokens) if token in (("punctuation", ":="), ("punctuation", "="))), None)
    names = () if sign is None else tuple(text for kind, text in tokens[:sign] if kind == "variable")
    expression, rest = _command(tokens, 0 if sign is None else sign + 1)
    if rest != len(tokens):
        raise TemplateError(f"unknown: {tokens[rest][1]!r}")
    return names, expression


def _command(tokens: list[tuple[str, str]], index: int) -> tuple[Any, int]:
    """A function with operands, or one operand."""
    if index >= len(tokens):
        raise TemplateError("an expression is missing")
    kind, text = tokens[index]
    if kind != "word" or text in ("true", "false"):
        return _operand(tokens, index)
    if text not in _FUNCTIONS and text not in ("and", "or"):
        raise TemplateError(f"unknown function {text}")
    operands, index = [], index + 1
    while index < len(tokens) and tokens[index] != ("punctuation", ")"):
        operand, index = _operand(tokens, index)
        operands.append(operand)
    return ("call", text, operands), index


def _operand(tokens: list[tuple[str, str]], index: int) -> tuple[Any, int]:
    kind, text = tokens[index]
    if (kind, text) == ("punctuation", "("):
        inner, index = _command(tokens, index + 1)
        if index >= len(tokens) or tokens[index] != ("punctuation", ")"):
            raise TemplateError("a parenthesis is not closed")
        return inner, index + 1
    if kind == "string":
        return ("constant", text[1:-1] if text[0] == "`" else json.loads(text)), index + 1
    if kind == "number":
        return ("constant", int(text)), index + 1
    if kind == "word" and text in ("true", "false"):
        return ("constant", text == "true"), index + 1
    if kind in ("field", "dot", "variable"):
        base, *path = text.split(".") if kind == "variable" else ["", *text.split(".")[1:]]
        return ("path", base, [part for part in path if part]), index + 1
    raise TemplateError(f"unknown: {text!r}")


class _Scope:
    """Variables, the innermost block last."""

    def __init__(self, levels: list[dict[str, Any]]) -> None:
        self._levels = levels

    def inner(self) -> _Scope:
        return _Scope([*self._levels, {}])

    def get(self, name: str) -> Any:
        for level in reversed(self._levels):
            if name in level:
                return level[name]
        raise TemplateError(f"undefined variable {name}")

    def declare(self, name: str, value: Any) -> None:
        self._levels[-1][name] = value

    def assign(self, name: str, value: Any) -> None:
        for level in reversed(self._levels):
            if name in level:
                level[name] = value
                return
        raise TemplateError(f"undefined variable {name}")


def _run(nodes: Sequence[_Node], scope: _Scope, dot: Any, out: list[str]) -> None:
    for node in nodes:
        if node.kind == "text":
            out.append(node.text)
        elif node.kind == "print":
            out.append(_printed(_value(node.expression, scope, dot)))
        elif node.kind == "set":
            (scope.assign if node.text == "=" else scope.declare)(node.names[0], _value(node.expression, scope, dot))
        else:
            _run_branch(node, scope.inner(), dot, out)


def _run_branch(node: _Node, scope: _Scope, dot: Any, out: list[str]) -> None:
    value = _value(node.expression, scope, dot)
    if node.kind == "range" and value:
        for index, item in enumerate(value):
            inner = scope.inner()
            for name, part in zip(node.names, (index, item) if len(node.names) == 2 else (item,), strict=False):
                inner.declare(name, part)
            _run(node.body, inner, item, out)
        return
    if node.kind != "range" and node.names:
        scope.declare(node.names[0], value)
    if node.kind != "range" and value:
        _run(node.body, scope, value if node.kind == "with" else dot, out)
    else:
        _run(node.otherwise, scope, dot, out)


def _value(expression: Any, scope: _Scope, dot: Any) -> Any:
    kind = expression[0]
    if kind == "constant":
        return expression[1]
    if kind == "path":
        value = scope.get(expression[1]) if expression[1] else dot
        for name in expression[2]:
            value = _field(value, name)
        return value
    _, name, operands = expression
    if name in ("and", "or"):
        # The first that decides, or the last; the others are not looked at.
        result: Any = None
        for operand in operands:
            result = _value(operand, scope, dot)
            if bool(result) == (name == "or"):
                break
        return result
    return _FUNCTIONS[name](*[_value(operand, scope, dot) for operand in operands])


def _field(value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise TemplateError(f"{name} is asked of what has no fields")
    if name not in value:
        raise TemplateError(f"there is no field {name}")
    return value[name]


def _printed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    # Ollama's own types print themselves as JSON.
    return _json(value)


def _json(value: Any) -> str:
    """As Go's encoding/json writes it: compact, and with HTML's characters escaped."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: Any) -> Any:
    if isinstance(value, Struct):
        return {key: _plain(item) for key, item in value.json.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _slice(value: Sequence[Any], start: int, end: int | None = None) -> Sequence[Any]:
    if not 0 <= start <= len(value):
        raise TemplateError("slice bounds out of range")
    return value[start:end]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "not": lambda value: not value,
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, other: first != other,
    "lt": lambda first, other: first < other,
    "le": lambda first, other: first <= other,
    "gt": lambda first, other: first > other,
    "ge": lambda first, other: first >= other,
    "len": len,
    "slice": _slice,
    "index": lambda value, key: value[key],
    "json": _json,
}


class Struct(dict[str, Any]):
    """A value of one of Ollama's types: fields as templates name them; `json` is what they are called there, what is left out absent."""

    def __init__(self, fields: Mapping[str, Any], as_json: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.json = as_json


def ollama_values(messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (), system: str = "") -> dict[str, Any]:
    """What Ollama's chat gives a template for OpenAI's `messages` and `tools`, with the Modelfile's SYSTEM `system`.

    Messages of one role in a row are joined, system messages are collected, and SYSTEM stands first where the conversation begins
    otherwise (ollama: template/template.go, server/prompt.go, server/routes.go).
    """
    if system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    collated: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content") or ""
        if collated and collated[-1]["Role"] == message["role"] != "tool":
            collated[-1]["Content"] += "\n\n" + content
        else:
            collated.append(_message(message, content))
    return {
        "System": "\n\n".join(message["content"] for message in messages if message["role"] == "system"),
        "Messages": collated,
        "Tools": [_tool(tool) for tool in tools],
        "Response": "",
        "Think": False,
        "IsThinkSet": False,
    }


def _message(message: Mapping[str, Any], content: str) -> dict[str, Any]:
    calls = [_call(index, call["function"]) for index, call in enumerate(message.get("tool_calls") or ())]
    return {
        "Role": message["role"],
        "Content": content,
        "Thinking": "",
        "ToolCalls": calls,
        "ToolName": message.get("name", ""),
        "ToolCallID": message.get("tool_call_id", ""),
    }


def _call(index: int, function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    inner = Struct(
        {"Index": index, "Name": function["name"], "Arguments": parsed}, {"index": index, "name": function["name"], "arguments": parsed}
    )
    return Struct({"ID": "", "Function": inner}, {"function": inner})


def _tool(tool: Mapping[str, Any]) -> Struct:
    function = tool["function"]
    order = ("type", "$defs", "items", "required", "properties")
    parameters = {key: function["parameters"][key] for key in order if key in function["parameters"]}
    described = {"description": function["description"]} if function.get("description") else {}
    inner = Struct(
        {"Name": function["name"], "Description": function.get("description", ""), "Parameters": parameters},
        {"name": function["name"], **described, "parameters": parameters},
    )
    return Struct({"Type": tool["type"], "Function": inner}, {"type": tool["type"], "function": inner})
