"""`finery deploy` and what follows it: canaries, promotion, rolling back, pins, and how an alias' versions do."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.text import Text

from finery_cli.client import Gateway, connected
from finery_cli.commands.options import Json
from finery_cli.output import err, fail, show

ALIAS_COLUMNS = (
    "state", "alias", "base_model", "version", "canary", "canary_weight", "previous", "pinned", "epoch", "job_id", "swap_seconds",
)  # fmt: skip
LIST_COLUMNS = ("alias", "version", "canary", "canary_weight", "previous", "pinned", "state")
VERSION_COLUMNS = (
    "role", "version", "weight", "answered", "failed", "refused", "cancelled", "prompt_tokens", "completion_tokens",
    "mean_first_byte_seconds", "mean_request_seconds",
)  # fmt: skip
_POLL_S = 0.2
_PAGE_SIZE = 1000

Alias = Annotated[str, typer.Argument(help="The public model name.")]
Wait = Annotated[bool, typer.Option(help="Return when it serves.")]

app = typer.Typer(no_args_is_help=True, help="Aliases and the versions that they serve.")


def register(app: typer.Typer) -> None:
    """Adds `finery deploy` and the commands for a version that serves already to `app`."""
    for command in (deploy, canary, promote, rollback, pin, unpin):
        app.command()(command)


def deploy(
    job_id: Annotated[str, typer.Argument(help="The job whose adapter it is.")],
    *,
    alias: Annotated[str | None, typer.Option(help="Public name; default: the job's own. A name in use is swapped without a gap.")] = None,
    step: Annotated[int | None, typer.Option(help="A checkpoint instead of the final adapter.")] = None,
    canary: Annotated[
        int | None, typer.Option(min=1, max=99, help="Percent of the name's requests; what serves now answers the rest.")
    ] = None,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Serve a job's adapter under a name: swap what serves there now, or share its requests as a canary."""
    given = {"alias": alias or None, "step": step, "canary_weight": canary}
    body = {"job_id": job_id, **{field: value for field, value in given.items() if value is not None}}
    with connected() as gateway:
        deployed = gateway.native.post("/deployments", json=body).json()
        if wait:
            deployed = _wait_rolled_out(gateway, deployed)
    _show(deployed, as_json=as_json)


def canary(
    alias: Alias,
    weight: Annotated[int, typer.Argument(help="Percent of the requests.", min=1, max=99)],
    *,
    as_json: Json = False,
) -> None:
    """Change the share of requests that a canary answers."""
    with connected() as gateway:
        changed = _change(gateway, alias, "canary", json={"weight": weight})
    _show(changed, as_json=as_json)


def promote(alias: Alias, *, as_json: Json = False) -> None:
    """Give the canary the whole alias, at once."""
    with connected() as gateway:
        changed = _change(gateway, alias, "promote")
    _show(changed, as_json=as_json)


def rollback(alias: Alias, *, wait: Wait = True, as_json: Json = False) -> None:
    """Drop the canary or the rollout under way; without either, go back to the version that served before."""
    with connected() as gateway:
        changed = _change(gateway, alias, "rollback")
        # A canary is gone already, and the rollout that the alias shows may be another's.
        if wait and _rollout(changed)["state"] == "pending":
            changed = _wait_rolled_out(gateway, changed)
    _show(changed, as_json=as_json)


def pin(alias: Alias, *, as_json: Json = False) -> None:
    """Keep an alias' version loaded, whatever else is asked for."""
    with connected() as gateway:
        pinned = gateway.native.post(f"/deployments/{alias}/pin").json()
    _show(pinned, as_json=as_json)


def unpin(alias: Alias, *, as_json: Json = False) -> None:
    """Let an alias' version make room for others again."""
    with connected() as gateway:
        unpinned = gateway.native.post(f"/deployments/{alias}/unpin").json()
    _show(unpinned, as_json=as_json)


@app.command("list")
def list_deployments(*, as_json: Json = False) -> None:
    """List aliases with what they serve."""
    aliases: list[dict[str, object]] = []
    token = ""
    with connected() as gateway:
        while True:
            page = gateway.native.get("/deployments", params={"page_size": _PAGE_SIZE, "page_token": token}).json()
            aliases += page["data"]
            token = page["next_page_token"]
            if not token:
                break
    show(aliases if as_json else [_flat(alias) for alias in aliases], columns=LIST_COLUMNS, as_json=as_json)


@app.command()
def get(alias: Alias, *, as_json: Json = False) -> None:
    """Show an alias, and how its versions have done since the gateway's process started."""
    with connected() as gateway:
        found = gateway.native.get(f"/deployments/{alias}").json()
        versions = gateway.native.get(f"/deployments/{alias}/versions").json()
    if as_json:
        show(found | {"versions": versions}, columns=(), as_json=True)
        return
    _show(found, as_json=False)
    show(versions, columns=VERSION_COLUMNS, as_json=False)


def _change(gateway: Gateway, alias: str, action: str, *, json: dict[str, object] | None = None) -> dict[str, object]:
    """Asks for `action` on the alias as it is now: what somebody else changes in between makes it fail, not act twice."""
    etag = gateway.native.get(f"/deployments/{alias}").json()["etag"]
    return gateway.native.post(f"/deployments/{alias}/{action}", json=json, headers={"if-match": f'"{etag}"'}).json()


def _show(alias: dict[str, object], *, as_json: bool) -> None:
    rollout = _rollout(alias)
    extra = {"state": rollout["state"], "swap_seconds": rollout.get("swap_seconds")}
    show(alias | extra if as_json else _flat(alias) | extra, columns=ALIAS_COLUMNS, as_json=as_json)


def _flat(alias: dict[str, object]) -> dict[str, object]:
    """For a table: versions by their names."""
    canary, previous = alias.get("canary"), alias.get("previous")
    return alias | {
        "state": _rollout(alias)["state"],
        "canary": canary["version"] if isinstance(canary, dict) else None,
        "canary_weight": canary["weight"] if isinstance(canary, dict) else None,
        "previous": previous["version"] if isinstance(previous, dict) else None,
        "pinned": "yes" if alias.get("pinned") else None,
    }


def _wait_rolled_out(gateway: Gateway, deployed: dict[str, object]) -> dict[str, object]:
    """Follows the rollout that was asked for; one that a later deployment replaced counts as over."""
    version = _rollout(deployed).get("version")
    with err.status(Text(f"rolling out {version}")) as status:
        while True:
            rollout = _rollout(deployed)
            state = str(rollout["state"])
            if state == "failed":
                fail(f"The rollout of {version} failed, what served before goes on: {_message(rollout)}")
            if state in ("ready", "draining", "canary", "rolled_back") or rollout.get("version") != version:
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
