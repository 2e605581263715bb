"""`finery models`: what is served, and under which name."""

from __future__ import annotations

import typer

from finery_cli.client import connected
from finery_cli.commands.options import Json
from finery_cli.output import show

MODEL_COLUMNS = ("id", "ready", "base_model", "job_id", "created")

app = typer.Typer(no_args_is_help=True, help="Models that can be asked.")


@app.command("list")
def list_models(*, as_json: Json = False) -> None:
    """List base models and aliases."""
    with connected() as gateway:
        rows = [model.to_dict() for model in gateway.openai.models.list()]
    show(rows, columns=MODEL_COLUMNS, as_json=as_json)


@app.command()
def delete(model: str, *, as_json: Json = False) -> None:
    """Take an alias out of serving; its adapter stays."""
    with connected() as gateway:
        gone = gateway.openai.models.delete(model)
    show(gone.to_dict(), columns=("id", "deleted"), as_json=as_json)
