"""`finery convert`: what a job has trained, in a format that other engines read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.progress import Progress

from finery_cli.client import Gateway, connected
from finery_cli.commands.options import Json
from finery_cli.output import err, fail, show
from finery_common.conversion_spec import BaseWeights, OutputFormat, OutputType

_POLL_S = 0.5
_FINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class _Conversion:
    id: str
    state: str
    progress: float
    reason: str
    """Why it failed, where it did."""
    report: dict[str, Any] | None
    """What was measured."""
    hub: dict[str, Any] | None
    """What came of the push."""


def register(app: typer.Typer) -> None:
    """Adds `finery convert` to `app`."""
    app.command()(convert)


def convert(
    job_id: Annotated[str, typer.Argument(help="The job whose adapter, or whole model, is converted.")],
    *,
    output: Annotated[Path, typer.Option(help="Folder to put the files into; made where missing.")],
    step: Annotated[int | None, typer.Option(help="A checkpoint instead of the final adapter.")] = None,
    output_format: Annotated[
        OutputFormat, typer.Option("--format", help="A merged Hugging Face folder, GGUF, or the adapter by itself.")
    ] = OutputFormat.GGUF,
    output_type: Annotated[OutputType | None, typer.Option("--type", help="Such as f16 or q4_k_m; by default 16 bits.")] = None,
    scale: Annotated[float | None, typer.Option(help="Multiply the adapter's update.")] = None,
    base_weights: Annotated[BaseWeights | None, typer.Option(help="Of adapters trained on NF4: what to merge into.")] = None,
    calibration_dataset: Annotated[str | None, typer.Option(help="A prepared dataset to measure with, by id.")] = None,
    importance_matrix: Annotated[bool | None, typer.Option(help="Weigh GGUF's rounding by the inputs' squares.")] = None,
    max_file_size_bytes: Annotated[int | None, typer.Option(help="Split files of weights at this size.")] = None,
    hub: Annotated[str | None, typer.Option(help="Hugging Face repository, owner/name, to push to as well.")] = None,
    hub_token: Annotated[str | None, typer.Option(help="Name of the secret with its token, as the operator has set it.")] = None,
    hub_public: Annotated[bool, typer.Option("--hub-public", help="Make the repository a public one, where it is made.")] = False,
    as_json: Json = False,
) -> None:
    """Merge a job's adapter into its base model, prove that it is the same model, and fetch the result."""
    asked: dict[str, object] = {
        "format": output_format.value,
        "type": output_type and output_type.value,
        "scale": scale,
        "base_weights": base_weights and base_weights.value,
        "calibration_dataset": calibration_dataset and f"datasets/{calibration_dataset}",
        "importance_matrix": importance_matrix,
        "max_file_size_bytes": max_file_size_bytes,
        "hub": _hub(hub, token=hub_token, is_public=hub_public),
    }
    body = {name: value for name, value in asked.items() if value is not None}
    with connected() as gateway:
        conversion = _finished(gateway, _parsed(gateway.native.post("/conversions", json=_source(gateway, job_id, step=step) | body)))
        if conversion.state != "succeeded":
            fail(f"The conversion {conversion.id} {conversion.state}: {conversion.reason}")
        files = _fetch(gateway, conversion.id, output)
    show(
        {"id": conversion.id, "files": [str(file) for file in files], "report": conversion.report, "hub": conversion.hub},
        columns=("id", "files"),
        as_json=as_json,
    )
    if problem := (conversion.hub or {}).get("error"):
        fail(f"The model is converted and fetched, but was not pushed: {problem['message']}")


def _hub(repository: str | None, *, token: str | None, is_public: bool) -> dict[str, object] | None:
    if repository is None:
        if token is not None or is_public:
            fail("--hub-token and --hub-public go with --hub, which names the repository.")
        return None
    return {"repository": repository, "private": not is_public, **({} if token is None else {"token": token})}


def _source(gateway: Gateway, job_id: str, *, step: int | None) -> dict[str, object]:
    """The adapter of `step`, by default the final one; of a job that trained all weights its model."""
    if step is not None:
        return {"adapter": f"adapters/{job_id}-{step}"}
    if (status := gateway.openai.fine_tuning.jobs.retrieve(job_id).status) != "succeeded":
        fail(f"{job_id} is {status}; `finery jobs watch {job_id}` shows how far it is, and --step converts a checkpoint of it.")
    newest = next(iter(gateway.openai.fine_tuning.jobs.checkpoints.list(job_id, limit=1)), None)
    return {"model": f"models/{job_id}"} if newest is None else {"adapter": f"adapters/{job_id}-{newest.step_number}"}


def _finished(gateway: Gateway, conversion: _Conversion) -> _Conversion:
    """The conversion at its end. Its id is said at once: it goes on whatever becomes of this command."""
    err.print(conversion.id)
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
    return _Conversion(body["id"], body["state"], body["progress"], reason, body.get("report"), body.get("hub"))


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
