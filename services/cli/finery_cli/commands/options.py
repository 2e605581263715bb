"""Options that many commands share, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer

from finery_cli.output import fail

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="Where this machine's system keeps everything; default $FINERY_STATE_DIR.")
]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most this many.")]
Settings = Annotated[str | None, typer.Option("--spec", help="Any training setting, as JSON or the path of a JSON file.")]


def read_settings(text: str | None) -> dict[str, object]:
    """What `--spec` says, nothing where it is not given. Ends the command where that is no JSON object."""
    if text is None:
        return {}
    source = text
    if not text.lstrip().startswith(("{", "[")):
        try:
            source = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--spec: got {text[:80]!r}, which is neither JSON nor a file that can be read ({error}); correct the path, or write JSON")
    try:
        parsed = cast("object", json.loads(source))
    except ValueError as error:
        fail(f"--spec: got {text[:80]!r}, wanted JSON or the path of a JSON file ({error})")
    if not isinstance(parsed, dict):
        fail('--spec: wanted a JSON object such as {"lora": {"rank": 8}}')
    return cast("dict[str, object]", parsed)
