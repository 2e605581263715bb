"""What the command prints: tables for people, JSON for machines, errors on standard error.

Owns the look. Every command answers through `show`, so that `--json` means the same everywhere. What users, services and logs say is
shown as it is: it never counts as Rich's markup.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NoReturn

import httpx
import openai
import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from finery_common.errors import FineryError

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)
PULSE_S = 10.0


def show(value: Mapping[str, object] | Sequence[Mapping[str, object]], *, columns: Sequence[str], as_json: bool) -> None:
    """Prints one object or several: as JSON, as a table of `columns`, or one object as name and value lines."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
    elif isinstance(value, Mapping):
        for column in columns:
            if value.get(column) not in (None, "", [], {}):
                out.print(f"[bold]{column}[/]  {escape(_cell(column, value.get(column)))}")
    else:
        _show_rows([[_cell(column, row.get(column)) for column in columns] for row in value], columns)


def _show_rows(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    """A table as wide as it is: an id that is broken or cut cannot be copied."""
    if not rows:
        out.print("[dim]nothing here yet[/]")
        return
    widths = [max(cell_len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    for number, row in enumerate([columns, *rows]):
        cells = (set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True))
        out.print(Text("  ".join(cells).rstrip(), style="" if number else "bold"), soft_wrap=True)


class Pulse:
    """A line now and then where no bar is drawn, because standard error is no terminal."""

    def __init__(self) -> None:
        self._next_s = time.monotonic() + PULSE_S

    def beat(self, text: str) -> None:
        """Says `text` if the last line is `PULSE_S` seconds old."""
        if not err.is_terminal and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + PULSE_S
            say(text)


def say(text: str, *, at_s: float | None = None) -> None:
    """One line of what goes on, on standard error, under its time: now, or `at_s` in seconds since 1970."""
    clock = time.strftime("%H:%M:%S", time.localtime(at_s))
    err.print(Text.assemble((clock, "dim"), " ", text), soft_wrap=True)


def _cell(column: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    if (column == "created" or column.endswith("_at")) and isinstance(value, int):
        # 0 stands for a time that is not known yet.
        if not value:
            return ""
        return datetime.fromtimestamp(value, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, Mapping):
        return str(value.get("message") or json.dumps(value))
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)


@contextmanager
def clear_errors(url: str | None = None) -> Iterator[None]:
    """Turns what can go wrong, in calls to `url` where there are any, into one clear line and exit code 1."""
    try:
        yield
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        fail(str(body.get("message") or error.message))
    except httpx.HTTPStatusError as error:
        fail(_envelope_message(error.response))
    except (openai.APIConnectionError, httpx.TransportError):
        where = f"No Finery answers at {url}" if url else "Finery does not answer"
        fail(f"{where}; start one with `finery up`, or set FINERY_URL (and FINERY_API_KEY) to one that runs.")
    except FineryError as error:
        fail(error.message)


def fail(message: str) -> NoReturn:
    """Prints `message` and exits with 1."""
    err.print(Text.assemble(("error", "red"), " ", message), soft_wrap=True)
    raise typer.Exit(1)


def _envelope_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:300]}"
