"""`finery chat`: ask a model one question, or talk with it."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from openai.types.chat import ChatCompletionMessageParam
from rich.text import Text

from finery_cli.client import Gateway, connected
from finery_cli.commands.options import Json
from finery_cli.output import fail, out


def register(app: typer.Typer) -> None:
    """Adds `finery chat` to `app`."""
    app.command()(chat)


def chat(
    question: Annotated[str | None, typer.Argument(help="One question; without it a conversation starts.")] = None,
    *,
    model: Annotated[str | None, typer.Option(help="An alias or base model; default: the newest fine-tuned model.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    as_json: Json = False,
) -> None:
    """Chat with a model."""
    with connected() as gateway:
        name = model or _newest_model(gateway)
        messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": system}] if system else []
        if question is not None:
            _ask(
                gateway,
                name,
                [*messages, {"role": "user", "content": question}],
                max_tokens=max_tokens,
                temperature=temperature,
                as_json=as_json,
            )
            return
        if as_json:
            fail('--json needs a question: finery chat --json "…"')
        out.print(Text(f"{name}; an empty line or Ctrl-D ends", style="dim"))
        for line in iter(_read_line, ""):
            messages.append({"role": "user", "content": line})
            answer = _ask(gateway, name, messages, max_tokens=max_tokens, temperature=temperature, as_json=False)
            messages.append({"role": "assistant", "content": answer})


def _ask(
    gateway: Gateway, model: str, messages: list[ChatCompletionMessageParam], *, max_tokens: int, temperature: float, as_json: bool
) -> str:
    create = gateway.openai.chat.completions.create
    if as_json:
        answer = create(model=model, messages=messages, max_tokens=max_tokens, temperature=temperature)
        sys.stdout.write(json.dumps(answer.to_dict(), indent=2) + "\n")
        return ""
    parts: list[str] = []
    for chunk in create(model=model, messages=messages, max_tokens=max_tokens, temperature=temperature, stream=True):
        text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
        parts.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(parts)


def _newest_model(gateway: Gateway) -> str:
    models = sorted(gateway.openai.models.list(), key=lambda item: (item.id.startswith("ft:"), item.created))
    if not models:
        fail("No model is being served; `finery status` tells why.")
    return models[-1].id


def _read_line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""
