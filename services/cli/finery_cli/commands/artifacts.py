"""`finery artifacts`: what the project has published, and ways to have it here."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from finery_cli.client import Gateway, connected
from finery_cli.commands.options import Json, Limit
from finery_cli.downloads import RemoteFile, download, list_files
from finery_cli.output import Pulse, err, fail, say, show

LISTED = ("adapters", "models", "datasets", "files")
_ADDRESS = re.compile(r"(?P<collection>files|datasets|adapters|models|metrics|checkpoints)/[A-Za-z0-9_-][A-Za-z0-9._-]*")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Address = Annotated[str, typer.Argument(help="adapters/ID, models/ID, datasets/ID, files/ID, metrics/JOB or checkpoints/JOB-STEP.")]

app = typer.Typer(no_args_is_help=True, help="What has been published: adapters, models, datasets, files.")


@app.command("list")
def list_artifacts(
    collection: Annotated[str, typer.Argument(help=f"One of {', '.join(LISTED)}; all where it is left out.")] = "",
    *,
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """List what is published."""
    if collection and collection not in LISTED:
        fail(f"got {collection!r}, wanted one of {', '.join(LISTED)}")
    with connected() as gateway:
        rows = [row for name in ([collection] if collection else LISTED) for row in _listed(gateway, name, limit)]
    show(rows, columns=("artifact", "size_bytes", "num_files", "created"), as_json=as_json)


@app.command("files")
def show_files(address: Address, *, as_json: Json = False) -> None:
    """Show an artifact's files."""
    with connected() as gateway:
        files = list_files(gateway, _checked(address))
    show([vars(file) for file in files], columns=("name", "size_bytes", "sha256"), as_json=as_json)


@app.command("url")
def make_url(
    address: Address,
    name: Annotated[str, typer.Argument(help="The file; `finery artifacts files` shows them.")],
    *,
    lifetime: Annotated[str, typer.Option(help="How long it lives: 30m, 12h, 7d at the most.")] = "1h",
    as_json: Json = False,
) -> None:
    """Make a URL by which anybody downloads one file without a key. Treat it as a secret until it ends."""
    body = {"lifetime_s": _seconds(lifetime)}
    with connected() as gateway:
        made = gateway.native.post(f"/artifacts/{_checked(address)}/files/{name}/download-url", json=body).json()
    if as_json:
        show(made, columns=(), as_json=True)
    else:
        # In one piece, for a shell to take.
        sys.stdout.write(made["url"] + "\n")
        say(f"ends at {made['expire_time']}")


@app.command("download")
def download_artifact(
    address: Address,
    *,
    output: Annotated[Path, typer.Option(help="Folder to put the files into; made where missing.")],
    only: Annotated[list[str] | None, typer.Option("--file", help="Only this file; may be given several times.")] = None,
    as_json: Json = False,
) -> None:
    """Download an artifact into a folder. Broken off, the same command goes on where it was."""
    with connected() as gateway:
        files = _chosen(list_files(gateway, _checked(address)), only or ())
        paths = download_with_progress(gateway, address, output, files=files)
    show({"artifact": address, "files": [str(path) for path in paths]}, columns=("artifact", "files"), as_json=as_json)


def download_with_progress(gateway: Gateway, address: str, folder: Path, *, files: tuple[RemoteFile, ...]) -> list[Path]:
    """`downloads.download` under a bar, or a line now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    total, pulse, done = sum(file.size_bytes for file in files), Pulse(), 0
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task("downloading", total=total)

        def on_bytes(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress.update(task, completed=done)
            pulse.beat(f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB")

        return download(gateway, address, folder, files=files, on_bytes=on_bytes, say=say)


def _listed(gateway: Gateway, collection: str, limit: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    token = ""
    while len(rows) < limit:
        page = gateway.native.get(f"/artifacts/{collection}", params={"page_size": min(limit, 100), "page_token": token}).json()
        for item in page["data"]:
            row: dict[str, object] = {"artifact": f"{collection}/{item['id']}", **item, "created": item["create_time"]}
            rows.append(row)
        token = page["next_page_token"]
        if not token:
            break
    return rows[:limit]


def _chosen(files: tuple[RemoteFile, ...], names: list[str] | tuple[str, ...]) -> tuple[RemoteFile, ...]:
    known = {file.name: file for file in files}
    if unknown := [name for name in names if name not in known]:
        fail(f"There is no file {unknown[0]!r}; there are {', '.join(list(known)[:10])}.")
    return tuple(known[name] for name in names) or files


def _checked(address: str) -> str:
    if not _ADDRESS.fullmatch(address):
        fail(f"got {address!r}, wanted a folder and an id such as models/conv-… or adapters/ftjob-…-20; `finery artifacts list` shows them")
    return address


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,7})([smhd])", text)
    if match is None:
        fail(f"--lifetime: got {text!r}, wanted a number and s, m, h or d, such as 12h")
    return int(match[1]) * _UNITS[match[2]]
