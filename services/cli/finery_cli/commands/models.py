"""`finery models` and `finery deploy`: what is served, and under which name."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.text import Text

from finery_cli.client import Gateway, connected
from finery_cli.commands.options import Json
from finery_cli.output import err, fail, show

MODEL_COLUMNS = ("id", "ready", "base_model", "job_id", "created")
ALIAS_COLUMNS = ("alias", "base_model", "version", "epoch", "job_id", "swap_seconds")
_POLL_S = 0.2

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


def register_deploy(app: typer.Typer) -> None:
    """Adds `finery deploy` to `app`."""
    app.command()(deploy)


def deploy(
    job_id: Annotated[str, typer.Argument(help="The job whose adapter it is.")],
    *,
    alias: Annotated[str | None, typer.Option(help="Public name; default: the job's own. A name in use is swapped without a gap.")] = None,
    step: Annotated[int | None, typer.Option(help="A checkpoint instead of the final adapter.")] = None,
    wait: Annotated[bool, typer.Option(help="Return when it serves.")] = True,
    as_json: Json = False,
) -> None:
    """Serve a job's adapter under a name, swapping what serves there now."""
    with connected() as gateway:
        body = {"job_id": job_id, **({"alias": alias} if alias else {}), **({"step": step} if step is not None else {})}
        deployed = gateway.native.post("/deployments", json=body).json()
        if wait:
            deployed = _wait_rolled_out(gateway, deployed)
    rollout = _rollout(deployed)
    show(
        deployed | {"swap_seconds": rollout.get("swap_seconds"), "state": rollout["state"]},
        columns=("state", *ALIAS_COLUMNS),
        as_json=as_json,
    )


def _wait_rolled_out(gateway: Gateway, deployed: dict[str, object]) -> dict[str, object]:
    """Follows the rollout that was asked for; one that a later deployment replaced counts as over."""
    version = _rollout(deployed).get("version")
    with err.status(Text(f"rolling out {version}")) as status:
        while True:
            rollout = _rollout(deployed)
            state = str(rollout["state"])
            if state == "failed":
                fail(f"The rollout of {version} failed, what served before goes on: {_message(rollout)}")
            if state in ("ready", "draining") or rollout.get("version") != version:
                return deployed
            status.update(Text(f"rolling out {version}: {state}"))
            time.sleep(_POLL_S)
            deployed = gateway.native.get(f"/deployments/{deployed['alias']}").json()


def _rollout(alias: dict[str, object]) -> dict[str, object]:
    rollout = alias.get("rollout")
    assert isinstance(rollout, dict)
    return rollout


def _message(rollout: dict[str, object]) -> object:
    error = rollout.get("error")
    return error.get("message") if isinstance(error, dict) else "no reason was given"
