"""`finery convert`: a job's adapter, merged and written in a format that other engines read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.progress import Progress

from finery_cli.client import Gateway, connected
from finery_cli.commands.options import Json
from finery_cli.output import err, fail, show
from finery_common.conversion_spec import OutputFormat, OutputType

_POLL_S = 0.5
_FINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class _Conversion:
    id: str
    state: str
    progress: float
    reason: str
    """Why it failed, where it did."""


def register(app: typer.Typer) -> None:
    """Adds `finery convert` to `app`."""
    app.command()(convert)


def convert(
    job_id: Annotated[str, typer.Argument(help="The job whose adapter is merged.")],
    *,
    output: Annotated[Path, typer.Option(help="Folder to put the files into; made where missing.")],
    step: Annotated[int | None, typer.Option(help="A checkpoint instead of the final adapter.")] = None,
    output_format: Annotated[OutputFormat, typer.Option("--format", help="A Hugging Face folder, or one GGUF file.")] = OutputFormat.GGUF,
    output_type: Annotated[OutputType, typer.Option("--type", help="Element type; q8_0 is GGUF's.")] = OutputType.F16,
    as_json: Json = False,
) -> None:
    """Merge a job's adapter into its base model, and fetch the result."""
    with connected() as gateway:
        adapter = f"adapters/{job_id}-{_last_step(gateway, job_id) if step is None else step}"
        body = {"adapter": adapter, "format": output_format.value, "type": output_type.value}
        conversion = _finished(gateway, _parsed(gateway.native.post("/conversions", json=body)))
        if conversion.state != "succeeded":
            fail(f"The conversion {conversion.id} {conversion.state}: {conversion.reason}")
        files = _fetch(gateway, conversion.id, output)
    show({"id": conversion.id, "files": [str(file) for file in files]}, columns=("id", "files"), as_json=as_json)


def _last_step(gateway: Gateway, job_id: str) -> int:
    newest = next(iter(gateway.openai.fine_tuning.jobs.checkpoints.list(job_id, limit=1)), None)
    if newest is None:
        if gateway.openai.fine_tuning.jobs.retrieve(job_id).status == "succeeded":
            fail(f"{job_id} has no adapter to merge: method full publishes a whole model, models/{job_id}, which the catalogue can name.")
        fail(f"{job_id} has published no adapter yet; `finery jobs watch {job_id}` shows how far it is.")
    return newest.step_number


def _finished(gateway: Gateway, conversion: _Conversion) -> _Conversion:
    with Progress(console=err) as progress:
        task = progress.add_task("converting", total=1.0)
        while conversion.state not in _FINAL:
            progress.update(task, completed=conversion.progress)
            time.sleep(_POLL_S)
            conversion = _parsed(gateway.native.get(f"/conversions/{conversion.id}"))
        progress.update(task, completed=1.0)
    return conversion


def _parsed(answer: httpx.Response) -> _Conversion:
    body = answer.json()
    reason = (body["error"] or {}).get("message", "no reason was given")
    return _Conversion(body["id"], body["state"], body["progress"], reason)


def _fetch(gateway: Gateway, conversion_id: str, folder: Path) -> list[Path]:
    """Every file under its own name; one that breaks off leaves nothing under that name."""
    fetched: list[Path] = []
    for entry in gateway.native.get(f"/conversions/{conversion_id}/files").json():
        target = folder / entry["name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        with gateway.native.stream("GET", f"/conversions/{conversion_id}/files/{entry['name']}") as answer, partial.open("wb") as file:
            for chunk in answer.iter_bytes():
                file.write(chunk)
        partial.replace(target)
        fetched.append(target)
    return fetched
