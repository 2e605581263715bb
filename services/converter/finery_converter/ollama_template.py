"""Ollama's template (Go) out of a model's chat template (Jinja), and the proof that they say the same.

Owns the derivation: the Jinja template is asked for probe conversations, and the texts around their contents become a Go template. Owns
the proof too: both are rendered on conversations that the probes are not. Leaves rendering to `chat_rendering` and `gotemplate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from finery_common.errors import UnimplementedError
from finery_converter.chat_rendering import (
    CLOCK,
    PLAIN_CONVERSATIONS,
    SEVERAL_CALLS,
    SYSTEM_CONVERSATIONS,
    TOOL_CONVERSATIONS,
    WEATHER,
    ChatTemplate,
    Message,
    Tool,
    message,
    tool_call,
)
from finery_converter.gotemplate import GoTemplate, TemplateError, ollama_values

# Contents that no template has words for.
_U1, _U2, _A1, _A2, _S1, _R1, _R2 = "Q1qz", "Q2qz", "A1qz", "A2qz", "S1qz", "R1qz", "R2qz"
_N1, _N2 = "n1qz", "n2qz"
_SHOWN = 60


class _NoForm(Exception):
    """The Jinja template says something that these Go templates have no form for."""


@dataclass(frozen=True, kw_only=True)
class OllamaTemplate:
    """`text` is the template, `default_system` what SYSTEM has to be, `ends` what follows an answer.

    `system` and `tools` say how far it was proven: "equal" is byte for byte; "equal_json" is equal but for white space and order inside
    JSON, which Go writes in its own way; "refused" is what the model's template refuses or leaves out itself; "left_out" is what this
    template has no form for, so that Ollama refuses tools. `notes` are for people.
    """

    text: str
    default_system: str
    ends: str
    system: Literal["equal", "refused"]
    tools: Literal["equal", "equal_json", "left_out", "refused"]
    notes: tuple[str, ...]


def ollama_template(chat: ChatTemplate, *, adds_bos: bool) -> OllamaTemplate:
    """Derives and proves. `adds_bos`: the runtime puts the beginning-of-sequence token first, so that the template must not.

    Raises UnimplementedError (code `ollama_template_unequal`) with the reason where no form says what `chat` does.
    """
    probe = _Probe(chat, adds_bos=adds_bos)
    try:
        if "strftime_now" in chat.source:
            raise _NoForm("it names the current date")
        shape = _derived(probe)
        for conversation in PLAIN_CONVERSATIONS:
            _prove(probe, shape, conversation)
        system = _proven_system(probe, shape)
    except _NoForm as reason:
        raise UnimplementedError(
            f"There is no Ollama template that says what this model's chat template does: {reason}. Use the GGUF file with llama.cpp, "
            "which reads the chat template itself.",
            code="ollama_template_unequal",
        ) from reason
    shape, tools, notes = _with_tools(probe, shape)
    return OllamaTemplate(
        text=shape.go(),
        default_system=shape.default_system,
        ends=shape.assistant[1],
        system=system,
        tools=tools,
        notes=(*_notes(probe), *notes),
    )


class _Probe:
    """Asks the Jinja template; a token that the runtime puts first is taken off."""

    def __init__(self, chat: ChatTemplate, *, adds_bos: bool) -> None:
        self.chat = chat
        self.added_bos = chat.special_tokens.get("bos_token", "") if adds_bos else ""

    def __call__(self, *messages: Message, tools: Sequence[Tool] = (), asks: bool = False) -> str:
        try:
            return self.chat.render(messages, tools=tools, asks=asks).removeprefix(self.added_bos)
        except ValueError as error:
            raise _NoForm(f"it refuses {' '.join(str(item['role']) for item in messages)}: {error}") from error


def _cut(text: str, *contents: str) -> list[str]:
    """The pieces of `text` around `contents`, which stand in it once each and in this order."""
    pieces: list[str] = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            raise _NoForm("it leaves out contents, repeats them or changes their order")
        pieces.append(before)
    return [*pieces, text]


def _after(text: str, prefix: str, what: str) -> str:
    if not text.startswith(prefix):
        raise _NoForm(f"{what} depends on what follows")
    return text[len(prefix) :]


@dataclass(frozen=True, kw_only=True)
class _Tools:
    """The texts around tools, calls and results."""

    # Before a system message, before the first tool with one and without one; after the last.
    before_system: str
    head: str
    head_without_system: str
    between: str
    tail: str
    only_function: bool
    # Before the first call of a message without content and of one with; between a name and its arguments; after the last.
    call: str
    call_after_content: str | None
    before_arguments: str
    between_calls: str
    after_calls: str
    result: str
    result_as_json: bool
    between_results: str
    after_results: str


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The texts around contents. `begins` and `system` reach up to the first user's content, `user` stands around every later one."""

    begins: str
    system: tuple[str, str] | None
    # Where a system message's text goes: before the first user's content, or before the last one's.
    system_place: Literal["first", "last"] = "first"
    user: tuple[str, str]
    assistant: tuple[str, str]
    asks: str
    default_system: str = ""
    tools: _Tools | None = field(default=None)

    def go(self) -> str:
        """As Ollama's template: Go's text/template on messages in a row."""
        variables = "{{ $begun := false }}" + ("{{ $results := false }}" if self.tools else "")
        last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        roles = _if([('eq .Role "user"', self._user()), ('eq .Role "assistant"', self._assistant()), *self._results()])
        asks = _if([('and $last (ne .Role "assistant")', _go(self.asks))])
        return f"{variables}{self._head()}{{{{ range $i, $_ := .Messages }}}}{last}{self._end_results()}{roles}{asks}{{{{ end }}}}"

    def _head(self) -> str:
        """All up to the first user's content."""
        plain = _go(self.begins)
        if self.system and self.system_place == "first":
            plain = _if([(".System", f"{_go(self.system[0])}{{{{ .System }}}}{_go(self.system[1])}")], plain)
        if self.tools is None or self.system is None:
            return plain
        tools = self.tools
        head = _if([(".System", f"{_go(tools.before_system)}{{{{ .System }}}}{_go(tools.head)}")], _go(tools.head_without_system))
        each = "{{ json .Function }}" if tools.only_function else "{{ json . }}"
        listed = f"{{{{ range $k, $_ := .Tools }}}}{_if([('$k', _go(tools.between))])}{each}{{{{ end }}}}"
        return _if([(".Tools", f"{head}{listed}{_go(tools.tail)}")], plain)

    def _user(self) -> str:
        before = _if([("$begun", _go(self.user[0]))])
        if self.system and self.system_place == "last":
            before += _if([("and $last $.System", f"{_go(self.system[0])}{{{{ $.System }}}}{_go(self.system[1])}")])
        return f"{before}{{{{ $begun = true }}}}{{{{ .Content }}}}{_go(self.user[1])}"

    def _assistant(self) -> str:
        """One that stands last is begun and not ended: Ollama goes on from there."""
        plain = f"{_go(self.assistant[0])}{{{{ .Content }}}}{_if([('not $last', _go(self.assistant[1]))])}"
        if self.tools is None:
            return plain
        tools = self.tools
        begins = _go(tools.call)
        if tools.call_after_content is not None:
            with_content = f"{_go(self.assistant[0])}{{{{ .Content }}}}{_go(tools.call_after_content)}"
            begins = _if([(".Content", with_content)], begins)
        call = f"{{{{ .Function.Name }}}}{_go(tools.before_arguments)}{{{{ json .Function.Arguments }}}}"
        calls = f"{{{{ range $k, $_ := .ToolCalls }}}}{_if([('$k', _go(tools.between_calls))])}{call}{{{{ end }}}}"
        return _if([(".ToolCalls", f"{begins}{calls}{_go(tools.after_calls)}")], plain)

    def _results(self) -> list[tuple[str, str]]:
        if self.tools is None:
            return []
        before = _if([("$results", _go(self.tools.between_results))], _go(self.tools.result))
        content = "{{ json .Content }}" if self.tools.result_as_json else "{{ .Content }}"
        return [('eq .Role "tool"', f"{before}{{{{ $results = true }}}}{content}{_if([('$last', _go(self.tools.after_results))])}")]

    def _end_results(self) -> str:
        if self.tools is None:
            return ""
        return _if([('and $results (ne .Role "tool")', f"{_go(self.tools.after_results)}{{{{ $results = false }}}}")])


def _go(text: str) -> str:
    """`text` so that Go's template says it."""
    return text.replace("{{", '{{ "{{" }}')


def _if(branches: Sequence[tuple[str, str]], otherwise: str = "") -> str:
    conditions = [f"{{{{ {'else if' if index else 'if'} {condition} }}}}{body}" for index, (condition, body) in enumerate(branches)]
    return "".join(conditions) + (f"{{{{ else }}}}{otherwise}" if otherwise else "") + "{{ end }}"


def _derived(probe: _Probe) -> _Shape:
    user, answer, again = message("user", _U1), message("assistant", _A1), message("user", _U2)
    begins, asked = _cut(probe(user, asks=True), _U1)
    after_user = _cut(probe(user), _U1)[1]
    _, to_answer, to_user, _ = _cut(probe(user, answer, again), _U1, _A1, _U2)
    after_answer = _cut(probe(user, answer), _A1)[1]
    if not (asked.startswith(after_user) and to_answer.startswith(after_user)):
        # It ends otherwise than it goes on. What is between contents is then all of the next one's beginning, or the last one's end.
        after_user = ""
    if not to_user.startswith(after_answer):
        after_answer = to_user
    shape = _Shape(
        begins=begins,
        system=None,
        user=(to_user.removeprefix(after_answer), after_user),
        assistant=(to_answer.removeprefix(after_user), after_answer),
        asks=asked.removeprefix(after_user),
    )
    return _with_system(probe, shape)


def _with_system(probe: _Probe, shape: _Shape) -> _Shape:
    system, user, answer, again = message("system", _S1), message("user", _U1), message("assistant", _A1), message("user", _U2)
    try:
        text = probe(system, user)
    except _NoForm:
        return shape
    if _S1 not in text:
        return shape
    longer = probe(system, user, answer, again)
    if longer.find(_S1) > longer.find(_A1):
        *_, before, after, _ = _cut(longer, _U1, _A1, _S1, _U2)
        before = _after(before, f"{shape.assistant[1]}{shape.user[0]}", "a system message")
        return replace(shape, system=(before, after), system_place="last")
    before, after, _ = _cut(text, _S1, _U1)
    default = ""
    if shape.begins.startswith(before) and shape.begins.endswith(after) and len(shape.begins) > len(before) + len(after):
        default = shape.begins[len(before) : len(shape.begins) - len(after)]
    return replace(shape, system=(before, after), default_system=default)


def _with_tools(probe: _Probe, shape: _Shape) -> tuple[_Shape, Literal["equal", "equal_json", "left_out", "refused"], tuple[str, ...]]:
    """The shape with tools in it where that can be proven."""
    try:
        text = probe(message("system", _S1), message("user", _U1), tools=[WEATHER]) if shape.system else ""
    except _NoForm as reason:
        return shape, "refused", (f"Tools: {reason}.",)
    if not shape.system or "get_weather" not in text:
        return shape, "refused", ("The model's chat template has no place for tools.",)
    try:
        if shape.system_place == "last":
            raise _NoForm("it puts them before the last message")
        found = replace(shape, tools=_tools(probe, shape))
        equal = [_prove(probe, found, messages, tools=tools) for messages, tools in TOOL_CONVERSATIONS]
        for conversation in (*PLAIN_CONVERSATIONS, *SYSTEM_CONVERSATIONS):
            _prove(probe, found, conversation)
        if not _refuses(probe, SEVERAL_CALLS, tools=[WEATHER, CLOCK]):
            equal.append(_prove(probe, found, SEVERAL_CALLS, tools=[WEATHER, CLOCK]))
    except _NoForm as reason:
        return shape, "left_out", (f"Tools are left out, since no Ollama template says what the model's does: {reason}.",)
    return found, "equal" if all(equal) else "equal_json", ()


def _tools(probe: _Probe, shape: _Shape) -> _Tools:
    assert shape.system is not None
    system, user = message("system", _S1), message("user", _U1)
    before, rest, _ = _cut(probe(system, user, tools=[WEATHER]), _S1, _U1)
    if "get_weather" in before:
        raise _NoForm("it puts them before the system message")
    (head, tail), only_function = _around_json(rest, [WEATHER])
    (head2, between, tail2), _ = _around_json(_cut(probe(system, user, tools=[WEATHER, CLOCK]), _S1, _U1)[1], [WEATHER, CLOCK])
    (alone, tail3), _ = _around_json(_cut(probe(user, tools=[WEATHER]), _U1)[0], [WEATHER])
    if (head, tail, tail) != (head2, tail2, tail3):
        raise _NoForm("what stands around them depends on their number or on the system message")
    calls, results = _calls(probe, shape)
    return _Tools(
        before_system=before,
        head=head,
        head_without_system=alone,
        between=between,
        tail=tail,
        only_function=only_function,
        **calls,
        **results,
    )


def _around_json(text: str, tools: Sequence[Tool]) -> tuple[list[str], bool]:
    """The pieces of `text` around the tools as JSON, and whether each is its function alone."""
    for only_function in (False, True):
        pieces, rest = [], text
        for tool in tools:
            place = _find_json(rest, tool["function"] if only_function else tool)
            if place is None:
                break
            pieces.append(rest[: place[0]])
            rest = rest[place[1] :]
        else:
            return [*pieces, rest], only_function
    raise _NoForm("it does not write them as JSON")


def _find_json(text: str, value: Any) -> tuple[int, int] | None:
    start = text.find("{")
    while start >= 0:
        try:
            found, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            found, end = None, start + 1
        if found == value:
            return start, end
        start = text.find("{", start + 1)
    return None


def _calls(probe: _Probe, shape: _Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    """The texts around calls, and around results."""
    user, result, tools = message("user", _U1), message("tool", _R1), [WEATHER]
    one = tool_call(_N1, k=_A1)
    answered = _after_user(probe(user, one, result, tools=tools), shape)
    call, rest, after_results = _cut(answered, _N1, _R1)
    (before_arguments, to_result), _ = _around_json(rest, [_ARGUMENTS])
    # What ends a message of calls, where it is the same at the end of the conversation.
    ending = _around_json(_cut(probe(user, one, tools=tools), _N1)[1], [_ARGUMENTS])[0][1]
    after_calls = ending if to_result.startswith(ending) else ""
    with_content = _after_user(probe(user, {**one, "content": _A2}, result, tools=tools), shape)
    results = probe(user, one, result, message("tool", _R2), tools=tools)
    calls = {
        "call": call,
        "call_after_content": _cut(with_content, _A2, _N1)[1] if _A2 in with_content else None,
        "before_arguments": before_arguments,
        "between_calls": _between_calls(probe),
        "after_calls": after_calls,
    }
    before, after, between = to_result.removeprefix(after_calls), after_results, _cut(results, _R1, _R2)[1]
    # A content that stands there as a JSON string has its quotes around it.
    as_json = f'{_R1}\\"' in probe(user, one, message("tool", f'{_R1}"'), tools=tools)
    if as_json:
        before, after, between = before.removesuffix('"'), after.removeprefix('"'), between.removeprefix('"').removesuffix('"')
    return calls, {"result": before, "result_as_json": as_json, "between_results": between, "after_results": after}


_ARGUMENTS: Tool = {"function": {"k": _A1}}


def _between_calls(probe: _Probe) -> str:
    """Nothing where the model calls one tool at a time."""
    one, two = tool_call(_N1, k=_A1), tool_call(_N2, k=_A1)
    both = {**one, "tool_calls": [*one["tool_calls"], *two["tool_calls"]]}
    try:
        text = probe(message("user", _U1), both, message("tool", _R1), message("tool", _R2), tools=[WEATHER])
    except _NoForm:
        return ""
    return _cut(_around_json(_cut(text, _N1)[1], [_ARGUMENTS])[0][1], _N2)[0]


def _after_user(text: str, shape: _Shape) -> str:
    return _after(_cut(text, _U1)[1], shape.user[1], "a user's message")


def _refuses(probe: _Probe, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> bool:
    try:
        probe(*messages, tools=tools)
    except _NoForm:
        return True
    return False


def _proven_system(probe: _Probe, shape: _Shape) -> Literal["equal", "refused"]:
    if _refuses(probe, SYSTEM_CONVERSATIONS[0]):
        return "refused"
    for conversation in SYSTEM_CONVERSATIONS:
        _prove(probe, shape, conversation)
    return "equal" if shape.system else "refused"


def _prove(probe: _Probe, shape: _Shape, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> bool:
    """Whether both say the same byte for byte; raises _NoForm where they differ in more than how JSON is written."""
    wanted = probe(*messages, tools=tools, asks=True)
    try:
        got = GoTemplate(shape.go()).execute(ollama_values(messages, tools=tools, system=shape.default_system))
    except TemplateError as error:
        raise _NoForm(f"Ollama's template fails: {error}") from error
    if got == wanted:
        return True
    if not tools or _with_plain_json(got) != _with_plain_json(wanted):
        place = next(
            (index for index, (one, other) in enumerate(zip(got, wanted, strict=False)) if one != other), min(len(got), len(wanted))
        )
        raise _NoForm(f"it says {wanted[place : place + _SHOWN]!r} where Ollama's would say {got[place : place + _SHOWN]!r}")
    return False


def _with_plain_json(text: str) -> str:
    """`text` with every JSON object in it written in one way."""
    out, position = [], 0
    while (start := text.find("{", position)) >= 0:
        out.append(text[position:start])
        try:
            value, position = json.JSONDecoder().raw_decode(text, start)
            out.append(json.dumps(value, sort_keys=True))
        except ValueError:
            out.append("{")
            position = start + 1
    return "".join([*out, text[position:]])


def _notes(probe: _Probe) -> tuple[str, ...]:
    notes: list[str] = []
    spaced = f"  {_U1}  "
    if spaced not in probe(message("user", spaced)):
        notes.append("The model's chat template strips white space around contents; Ollama's keeps it.")
    if probe.added_bos and not probe.chat.render([message("user", _U1)]).startswith(probe.added_bos):
        notes.append("Ollama puts the beginning-of-sequence token first, which the model's chat template does not.")
    return tuple(notes)


def manifest_facts(template: OllamaTemplate) -> Mapping[str, object]:
    """What of the proof goes into a conversion's manifest."""
    return {"plain": "equal", "system": template.system, "tools": template.tools, "notes": list(template.notes)}
