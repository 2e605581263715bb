"""`finery files`: upload, list, read and delete files."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import wrap_file

from finery_cli.client import connected
from finery_cli.commands.options import Json, Limit
from finery_cli.output import err, fail, show

COLUMNS = ("id", "filename", "bytes", "purpose", "created_at")

app = typer.Typer(no_args_is_help=True, help="Training data and results.")


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(help="A JSONL file of chat or prompt/completion rows.")],
    *,
    as_json: Json = False,
) -> None:
    """Upload a file for fine-tuning."""
    if not path.is_file():
        fail(f"{path} is not a file; give the path of a JSONL file.")
    with (
        connected() as gateway,
        path.open("rb") as raw,
        wrap_file(raw, path.stat().st_size, description=escape(path.name), console=err) as file,
    ):
        uploaded = gateway.openai.files.create(file=(path.name, file), purpose="fine-tune")
    show(uploaded.to_dict(), columns=COLUMNS, as_json=as_json)


@app.command("list")
def list_files(*, limit: Limit = 20, as_json: Json = False) -> None:
    """List files, newest first."""
    with connected() as gateway:
        rows = [item.to_dict() for item in islice(gateway.openai.files.list(limit=min(limit, 100)), limit)]
    show(rows, columns=COLUMNS, as_json=as_json)


@app.command()
def content(file_id: str) -> None:
    """Write a file's bytes to standard output."""
    with connected() as gateway, gateway.openai.files.with_streaming_response.content(file_id) as response:
        for chunk in response.iter_bytes():
            sys.stdout.buffer.write(chunk)


@app.command()
def delete(file_id: str, *, as_json: Json = False) -> None:
    """Delete a file."""
    with connected() as gateway:
        gone = gateway.openai.files.delete(file_id)
    show(gone.to_dict(), columns=("id", "deleted"), as_json=as_json)
