"""Rendering a chat template that somebody else wrote.

Owns the sandbox: what a template may touch, how long it may take and how much it may write. The same helpers as transformers' are
there, so that a template renders here as it does at inference. Runs in a worker's main thread, since the time limit is a signal;
whoever starts the worker limits its memory and ends it when even the signal cannot get through.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_LIMIT_S = 5.0
MAX_RENDERED_CHARS = 16 * 1024 * 1024


class TemplateError(Exception):
    """The template itself cannot be used, whatever the row: it does not compile, takes too long or writes too much."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class RefusedByTemplate(Exception):
    """The template raised for these messages; the text is its reason."""


class ChatTemplate:
    """A compiled template with the tokenizer's special tokens, such as `bos_token`. `now` is what `strftime_now` tells."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], now: datetime) -> None:
        """Raises TemplateError where `source` does not compile."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationMarks], undefined=jinja2.Undefined
        )
        environment.filters["tojson"] = _tojson
        helpers: dict[str, Callable[..., object]] = {"raise_exception": _refuse, "strftime_now": now.strftime}
        try:
            with _time_limit(RENDER_LIMIT_S):
                self._template = environment.from_string(source, globals=helpers)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise TemplateError("invalid_chat_template", f"The base model's chat template does not compile: {error}.") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, object]], *, tools: Sequence[Mapping[str, object]], add_generation_prompt: bool
    ) -> str:
        """The conversation as one text. Raises RefusedByTemplate, and TemplateError past a limit."""
        pieces: list[str] = []
        size_chars = 0
        try:
            with _time_limit(RENDER_LIMIT_S):
                for piece in self._template.generate(
                    messages=messages,
                    tools=list(tools) or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                ):
                    size_chars += len(piece)
                    if size_chars > MAX_RENDERED_CHARS:
                        raise TemplateError(
                            "chat_template_limit", f"The chat template wrote more than {MAX_RENDERED_CHARS} characters for one row."
                        )
                    pieces.append(piece)
        except (TemplateError, RefusedByTemplate):
            raise
        except MemoryError as error:
            raise TemplateError("chat_template_limit", "The chat template took more memory than it may for one row.") from error
        except Exception as error:  # somebody else's program: whatever it raises is its reason
            raise RefusedByTemplate(f"{type(error).__name__}: {error}") from error
        return "".join(pieces)


class _GenerationMarks(Extension):
    """Accepts `{% generation %}…{% endgeneration %}`; spans are found without them."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own form

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Callable[[], str]) -> str:
        return caller()


def _refuse(message: object) -> NoReturn:
    raise RefusedByTemplate(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  templates pass these by position
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@contextmanager
def _time_limit(limit_s: float) -> Iterator[None]:
    def expire(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise TemplateError("chat_template_limit", f"The chat template took more than {limit_s:g} s for one row.")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
