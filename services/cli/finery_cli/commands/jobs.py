"""`finery jobs`: create, follow and steer fine-tuning jobs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, cast

import openai
import typer

from finery_cli.client import Gateway, connected
from finery_cli.commands.options import Json, Limit, Settings, read_settings
from finery_cli.output import fail, say, show
from finery_cli.watch import watch_job
from finery_common.spec import MethodType, Quantization, TrainingSpec

COLUMNS = ("id", "status", "model", "fine_tuned_model", "trained_tokens", "created_at", "finished_at", "error")
LIST_COLUMNS = ("id", "status", "model", "fine_tuned_model", "created_at")

_ALWAYS_SHOWN = ("method", "lora.rank", "optimizer.learning_rate", "num_epochs")

app = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")


@app.command()
def create(
    training_file: Annotated[str, typer.Argument(help="Id of an uploaded file, or a path, which is uploaded first.")],
    *,
    model: Annotated[str, typer.Option(help="Base model; `finery models list` shows them.")],
    validation_file: Annotated[str | None, typer.Option(help="Id or path of a file that is only measured.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name: a-z, 0-9 and -.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed and data, same result.")] = None,
    method: Annotated[MethodType | None, typer.Option(help="What is trained; dpo wants files of preferences. Default: lora.")] = None,
    quantization: Annotated[Quantization | None, typer.Option(help="Of the frozen weights; lora with nf4 is QLoRA.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    spec: Settings = None,
    deploy: Annotated[
        bool | None,
        typer.Option("--deploy/--no-deploy", help="Serve the model when it is trained; default: where its base model is served."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it is done.")] = False,
    as_json: Json = False,
) -> None:
    """Create a job."""
    settings = _spec(spec, method=method, quantization=quantization, num_epochs=epochs, learning_rate=learning_rate)
    with connected() as gateway:
        job = gateway.openai.fine_tuning.jobs.create(
            model=model,
            training_file=_file_id(gateway, training_file),
            validation_file=_file_id(gateway, validation_file) if validation_file else openai.omit,
            suffix=suffix if suffix is not None else openai.omit,
            seed=seed if seed is not None else openai.omit,
            extra_body={"spec": settings} | ({} if deploy is None else {"deploy": deploy}),
        )
        if watch:
            job = watch_job(gateway.openai, job.id)
    show(job.to_dict(), columns=COLUMNS, as_json=as_json)
    if job.status in ("failed", "cancelled"):
        raise typer.Exit(1)


@app.command("list")
def list_jobs(*, limit: Limit = 20, as_json: Json = False) -> None:
    """List jobs, newest first."""
    with connected() as gateway:
        rows = [job.to_dict() for job in islice(gateway.openai.fine_tuning.jobs.list(limit=min(limit, 100)), limit)]
    show(rows, columns=LIST_COLUMNS, as_json=as_json)


@app.command()
def get(job_id: str, *, as_json: Json = False) -> None:
    """Show one job."""
    with connected() as gateway:
        job = gateway.openai.fine_tuning.jobs.retrieve(job_id).to_dict()
    show(job, columns=COLUMNS, as_json=as_json)
    if not as_json and isinstance(settings := job.get("spec"), Mapping):
        trained = settings_of(TrainingSpec.parse(settings))
        show(trained, columns=tuple(trained), as_json=False)


@app.command()
def watch(job_id: str, *, as_json: Json = False) -> None:
    """Follow a job: progress, loss, tokens a second, time left. Ctrl-C stops watching, not the job."""
    with connected() as gateway:
        job = watch_job(gateway.openai, job_id)
    show(job.to_dict(), columns=COLUMNS, as_json=as_json)
    if job.status in ("failed", "cancelled"):
        raise typer.Exit(1)


@app.command()
def events(job_id: str, *, limit: Limit = 50, as_json: Json = False) -> None:
    """Show a job's newest events."""
    with connected() as gateway:
        rows = [event.to_dict() for event in islice(gateway.openai.fine_tuning.jobs.list_events(job_id, limit=min(limit, 100)), limit)]
    show(rows[::-1], columns=("created_at", "level", "message"), as_json=as_json)


@app.command()
def checkpoints(job_id: str, *, limit: Limit = 50, as_json: Json = False) -> None:
    """Show the checkpoints that can be deployed."""
    with connected() as gateway:
        pages = gateway.openai.fine_tuning.jobs.checkpoints.list(job_id, limit=min(limit, 100))
        rows = [item.to_dict() for item in islice(pages, limit)]
    show(rows, columns=("id", "step_number", "fine_tuned_model_checkpoint", "created_at"), as_json=as_json)


@app.command()
def cancel(job_id: str, *, as_json: Json = False) -> None:
    """Stop a job within one step."""
    _steer("cancel", job_id, as_json=as_json)


@app.command()
def pause(job_id: str, *, as_json: Json = False) -> None:
    """Checkpoint a job and free its place."""
    _steer("pause", job_id, as_json=as_json)


@app.command()
def resume(job_id: str, *, as_json: Json = False) -> None:
    """Go on from the last checkpoint."""
    _steer("resume", job_id, as_json=as_json)


def _steer(action: str, job_id: str, *, as_json: bool) -> None:
    with connected() as gateway:
        jobs = gateway.openai.fine_tuning.jobs
        job = {"cancel": jobs.cancel, "pause": jobs.pause, "resume": jobs.resume}[action](job_id)
    if action == "cancel" and job.status in ("succeeded", "failed"):
        say(f"{job_id} had {job.status} before; nothing was cancelled")
    show(job.to_dict(), columns=COLUMNS, as_json=as_json)


def _spec(text: str | None, *, learning_rate: float | None, **given: object) -> dict[str, object]:
    settings = read_settings(text) | {name: value for name, value in given.items() if value is not None}
    if learning_rate is not None:
        optimizer = settings.setdefault("optimizer", {})
        if isinstance(optimizer, dict):
            optimizer["learning_rate"] = learning_rate
    return settings


def _file_id(gateway: Gateway, file: str) -> str:
    path = Path(file)
    if file.startswith("file-") and not path.exists():
        return file
    if not path.is_file():
        fail(f"{file} is neither a file's id nor a path; `finery files list` shows the ids.")
    with path.open("rb") as content:
        return gateway.openai.files.create(file=(path.name, content), purpose="fine-tune").id


def settings_of(spec: TrainingSpec) -> dict[str, object]:
    """What a job trains with, by field: the settings that everybody asks about, and all that are not the defaults."""
    fields = _flat(spec.model_dump(mode="json"))
    defaults = _flat(TrainingSpec(base_model=spec.base_model).model_dump(mode="json"))
    hidden = {"base_model", *(name for name in fields if name.startswith("lora.") and spec.method is MethodType.FULL)}
    return {name: value for name, value in fields.items() if name not in hidden and (name in _ALWAYS_SHOWN or value != defaults.get(name))}


def _flat(fields: Mapping[str, object], *, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(cast("Mapping[str, object]", value), prefix=f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
