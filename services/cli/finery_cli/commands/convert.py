"""`finery convert` and `finery conversions`: what jobs have trained, in a format that other engines read."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.progress import Progress

from finery_cli.client import Gateway, connected
from finery_cli.commands.artifacts import download_with_progress
from finery_cli.commands.options import Json, Limit
from finery_cli.downloads import list_files
from finery_cli.output import Pulse, err, fail, say, show
from finery_common.conversion_spec import OUTPUT_TYPES, BaseWeights, Combination, OutputFormat, OutputType

_POLL_S = 0.5
_PATIENCE_S = 60.0
_FINAL = ("succeeded", "failed", "cancelled")
COLUMNS = ("id", "state", "progress", "step", "source", "format", "type", "address", "create_time", "error")

conversions = typer.Typer(no_args_is_help=True, help="Conversions that run or have run; `finery convert` makes one.")


@dataclass(frozen=True)
class _Conversion:
    id: str
    state: str
    progress: float
    step: str
    """What is being done, once something is."""
    reason: str
    """Why it failed, where it did."""
    report: dict[str, Any] | None
    """What was measured."""
    hub: dict[str, Any] | None
    """What came of the push."""


def register(app: typer.Typer) -> None:
    """Adds both to `app`."""
    app.command()(convert)
    app.add_typer(conversions, name="conversions")


def convert(
    job_ids: Annotated[
        list[str], typer.Argument(help="The job whose adapter, or whole model, is converted; of several, their adapters in one.")
    ],
    *,
    output: Annotated[Path, typer.Option(help="Folder to put the files into; made where missing.")],
    step: Annotated[int | None, typer.Option(help="A checkpoint instead of the final adapter.")] = None,
    output_format: Annotated[
        OutputFormat, typer.Option("--format", help="A merged Hugging Face folder, GGUF, or the adapter by itself.")
    ] = OutputFormat.GGUF,
    output_type: Annotated[
        OutputType | None, typer.Option("--type", case_sensitive=False, help="Such as f16 or q4_k_m; by default 16 bits.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Multiply the adapter's update.")] = None,
    combination: Annotated[Combination | None, typer.Option(help="How several adapters become one; by default their exact sum.")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Of an adapter among several; once for each, in order.")] = None,
    density: Annotated[float | None, typer.Option(help="The share that ties and dare keep of each adapter.")] = None,
    base_weights: Annotated[BaseWeights | None, typer.Option(help="Of adapters trained on NF4: what to merge into.")] = None,
    calibration_dataset: Annotated[str | None, typer.Option(help="A prepared dataset to measure with, by id.")] = None,
    importance_matrix: Annotated[bool | None, typer.Option(help="Weigh GGUF's rounding by the inputs' squares.")] = None,
    max_file_size_bytes: Annotated[int | None, typer.Option(help="Split files of weights at this size.")] = None,
    hub: Annotated[str | None, typer.Option(help="Hugging Face repository, owner/name, to push to as well.")] = None,
    hub_token: Annotated[str | None, typer.Option(help="Name of the secret with its token, as the operator has set it.")] = None,
    hub_public: Annotated[bool, typer.Option("--hub-public", help="Make the repository a public one, where it is made.")] = False,
    as_json: Json = False,
) -> None:
    """Merge a job's adapter into its base model, prove that it is the same model, and fetch the result.

    Interrupted, it leaves the conversion running: `finery conversions get` shows it, `finery artifacts download models/ID
    --output DIR` fetches it.
    """
    asked: dict[str, object] = {
        "format": output_format.value,
        "type": output_type and output_type.value,
        "scale": scale,
        "combination": combination and combination.value,
        "density": density,
        "base_weights": base_weights and base_weights.value,
        "calibration_dataset": calibration_dataset and f"datasets/{calibration_dataset}",
        "importance_matrix": importance_matrix,
        "max_file_size_bytes": max_file_size_bytes,
        "hub": _hub(hub, token=hub_token, is_public=hub_public),
    }
    body = {name: value for name, value in asked.items() if value is not None}
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        fail(f"--output: {output} is {'a folder that holds files' if output.is_dir() else 'no folder'}; name a new or an empty one.")
    for name, value in (("scale", scale), ("density", density), *(("weight", value) for value in weight or ())):
        if value is not None and not math.isfinite(value):
            fail(f"--{name}: got {value}, wanted a number")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output: {output} cannot be made: {error.strerror}; name another.")
    with connected() as gateway:
        source = _source(gateway, job_ids, step=step, weights=weight)
        done = _converted(gateway, source | body, output)
    show(done, columns=("id", "files", "measured"), as_json=as_json)
    if problem := (done["hub"] or {}).get("error"):
        fail(f"The model is converted and fetched, but was not pushed: {problem['message']}")


def _converted(gateway: Gateway, request: dict[str, object], output: Path) -> dict[str, Any]:
    """What came of `request`, its files in `output`."""
    conversion = _finished(gateway, _parsed(gateway.native.post("/conversions", json=request)), output)
    if conversion.state == "cancelled":
        fail(f"The conversion {conversion.id} was cancelled; nothing of it is published.")
    if conversion.state != "succeeded":
        fail(f"The conversion {conversion.id} failed: {conversion.reason}")
    address = f"models/{conversion.id}"
    say(f"converted; broken off from here on, `finery artifacts download {address} --output {output}` goes on where it was")
    files = download_with_progress(gateway, address, output, files=list_files(gateway, address))
    measured = {"measured": _measured(conversion.report or {}), "report": conversion.report, "hub": conversion.hub}
    return {"id": conversion.id, "files": [str(file) for file in files], **measured}


def _hub(repository: str | None, *, token: str | None, is_public: bool) -> dict[str, object] | None:
    if repository is None:
        if token is not None or is_public:
            fail("--hub-token and --hub-public go with --hub, which names the repository.")
        return None
    return {"repository": repository, "private": not is_public, **({} if token is None else {"token": token})}


def _source(gateway: Gateway, job_ids: Sequence[str], *, step: int | None, weights: Sequence[float] | None) -> dict[str, object]:
    """What is converted. Of several jobs, all of which have adapters, each with its weight."""
    if weights and len(weights) != len(job_ids):
        fail(f"--weight: got {len(weights)}, wanted one for each of {len(job_ids)} jobs, or none")
    if weights and len(job_ids) == 1:
        fail("--weight: is of several adapters, and there is one job; --scale multiplies what its adapter does")
    sources = [_trained(gateway, job_id, step=step) for job_id in job_ids]
    if len(sources) == 1:
        return sources[0]
    if whole := next((source["model"] for source in sources if "model" in source), None):
        fail(f"{whole} was trained whole; only adapters can be combined.")
    given = weights or [1.0] * len(sources)
    return {"adapters": [source | {"weight": weight} for source, weight in zip(sources, given, strict=True)]}


def _trained(gateway: Gateway, job_id: str, *, step: int | None) -> dict[str, object]:
    """The adapter of `step`, by default the final one; of a job that trained all weights its model."""
    if step is not None:
        return {"adapter": f"adapters/{job_id}-{step}"}
    if (status := gateway.openai.fine_tuning.jobs.retrieve(job_id).status) != "succeeded":
        fail(f"{job_id} is {status}; `finery jobs watch {job_id}` shows how far it is, and --step converts a checkpoint of it.")
    newest = next(iter(gateway.openai.fine_tuning.jobs.checkpoints.list(job_id, limit=1)), None)
    return {"model": f"models/{job_id}"} if newest is None else {"adapter": f"adapters/{job_id}-{newest.step_number}"}


def _finished(gateway: Gateway, conversion: _Conversion, output: Path) -> _Conversion:
    """The conversion at its end. Its id is said at once: it goes on whatever becomes of this command."""
    err.print(conversion.id)
    pulse, answered_s = Pulse(), time.monotonic()
    with Progress(console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task(conversion.state, total=1.0)
        try:
            while conversion.state not in _FINAL:
                doing = conversion.step or conversion.state
                progress.update(task, completed=conversion.progress, description=doing)
                pulse.beat(f"{doing}: {conversion.progress:.0%} of the whole")
                time.sleep(_POLL_S)
                try:
                    conversion, answered_s = _parsed(gateway.native.get(f"/conversions/{conversion.id}")), time.monotonic()
                except (httpx.TransportError, httpx.HTTPStatusError) as error:
                    # A service that is started again goes on with it.
                    is_for_good = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
                    if is_for_good or time.monotonic() - answered_s > _PATIENCE_S:
                        raise
        except (KeyboardInterrupt, httpx.HTTPError):
            say(
                f"{conversion.id} goes on; `finery conversions get {conversion.id}` shows it, `cancel` stops it, "
                f"`finery artifacts download models/{conversion.id} --output {output}` fetches what it makes"
            )
            raise
        progress.update(task, completed=conversion.progress, description=conversion.state)
    return conversion


def _measured(report: dict[str, Any]) -> str:
    """What of a report everybody asks about."""
    parity, said = report.get("parity") or {}, list[str]()
    if perplexity := parity.get("perplexity"):
        # What JSON cannot say as a number is there in words.
        said.append("perplexity " + ", ".join(f"{name} {float(value):.4g}" for name, value in perplexity.items()))
    if found := parity.get("difference"):
        said.append(f"{parity['type']}: KL {found['mean_kl']:.3g} nats, top-1 {found['top1']:.1%}")
    for name in ("gguf", "quantized"):
        if found := report.get(name):
            said.append(f"{found['type']}: KL {found['mean_kl']:.3g} nats, top-1 {found['top1_agreement']:.1%}")
    if reason := (report.get("modelfile") or {}).get("reason"):
        said.append(f"no Modelfile: {reason}")
    return "; ".join(said)


def _parsed(answer: httpx.Response) -> _Conversion:
    body = answer.json()
    reason = (body["error"] or {}).get("message", "no reason was given")
    return _Conversion(body["id"], body["state"], body["progress"], body["step"], reason, body.get("report"), body.get("hub"))


@conversions.command("list")
def list_conversions(*, limit: Limit = 20, as_json: Json = False) -> None:
    """List conversions, newest first."""
    with connected() as gateway:
        rows = gateway.native.get("/conversions", params={"page_size": limit}).json()["data"]
    show([_row(row) for row in rows], columns=COLUMNS[:-1], as_json=as_json)


@conversions.command()
def get(conversion_id: str, *, as_json: Json = False) -> None:
    """Show one conversion, and what was measured of its result."""
    _show(conversion_id, method="GET", action="", as_json=as_json)


@conversions.command()
def cancel(conversion_id: str, *, as_json: Json = False) -> None:
    """Stop a conversion; nothing of it is published."""
    _show(conversion_id, method="POST", action="/cancel", as_json=as_json)


@conversions.command()
def delete(conversion_id: str) -> None:
    """Delete a conversion that has ended, and what it has published."""
    with connected() as gateway:
        gateway.native.delete(f"/conversions/{conversion_id}")
    say(f"{conversion_id} and what it published are deleted")


def _show(conversion_id: str, *, method: str, action: str, as_json: bool) -> None:
    with connected() as gateway:
        row = _row(gateway.native.request(method, f"/conversions/{conversion_id}{action}").json())
    show(row, columns=(*COLUMNS, "report", "hub"), as_json=as_json)


def _row(conversion: dict[str, Any]) -> dict[str, Any]:
    """A conversion as a table has it."""
    spec, artifact = conversion["spec"], conversion["artifact"]
    source = spec.get("adapter") or spec.get("model") or ", ".join(item["adapter"] for item in spec.get("adapters") or ())
    default = OUTPUT_TYPES[OutputFormat(spec["format"])][0].value
    address = f"models/{conversion['id']}" if artifact else None
    return conversion | {"source": source, "format": spec["format"], "type": spec["type"] or default, "address": address}
