"""`finery up`, `down`, `status`, `keys`, `quickstart`: the system on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Annotated

import psutil
import typer
from rich.text import Text

from finery_cli.client import connected
from finery_cli.commands.options import Json, StateDir
from finery_cli.local.layout import Layout, RunningStack
from finery_cli.local.process import StartInterruptedError
from finery_cli.local.stack import START_S, Stack
from finery_cli.output import clear_errors, err, fail, out, say, show
from finery_cli.quickstart import run_quickstart

HTTP_PORT = 8080
GRPC_PORT = 8081
DOWN_S = 120.0
_INTERRUPTED = 130

HttpPort = Annotated[int, typer.Option("--port", min=1, max=65535, help="REST and OpenAI API, on loopback.")]
GrpcPort = Annotated[int, typer.Option("--grpc-port", min=1, max=65535, help="Public gRPC, on loopback.")]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to `app`."""
    app.command()(up)
    app.command()(down)
    app.command()(status)
    app.command()(keys)
    app.command()(quickstart)


def up(
    *,
    state_dir: StateDir = None,
    port: HttpPort = HTTP_PORT,
    grpc_port: GrpcPort = GRPC_PORT,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when it is up; stop it by `finery down`.")] = False,
) -> None:
    """Start the whole system on this machine and keep it running."""
    layout = Layout.of(state_dir)
    if detach:
        _up_detached(layout, port=port, grpc_port=grpc_port)
        return
    stack = Stack(layout, http_port=port, grpc_port=grpc_port, say=say)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stack.interrupt())
    with clear_errors():
        try:
            with stack.running() as running:
                _say_how_to_go_on(layout, running)
                stack.supervise()
        except StartInterruptedError as error:
            say(error.message)
            raise typer.Exit(_INTERRUPTED) from error


def down(*, state_dir: StateDir = None) -> None:
    """Stop the system that runs on this machine; running jobs go on from their last checkpoint at the next start."""
    layout = Layout.of(state_dir)
    running = layout.running()
    if running is None:
        fail(f"Nothing runs from {layout.state_dir}.")
    try:
        process = psutil.Process(running.pid)
        process.terminate()
        process.wait(DOWN_S)
    except psutil.NoSuchProcess:
        pass  # It ended by itself meanwhile.
    except psutil.TimeoutExpired:
        fail(f"It was still stopping after {DOWN_S:.0f} s; see {layout.log_dir}.")
    out.print("stopped")


def status(*, state_dir: StateDir = None, as_json: Json = False) -> None:
    """Show what runs and what is being served."""
    layout = Layout.of(state_dir)
    running = layout.running()
    if running is None and not os.environ.get("FINERY_URL"):
        fail(f"Nothing runs from {layout.state_dir}; start it by `finery up`.")
    with connected(state_dir) as gateway:
        models = [model.to_dict() for model in gateway.openai.models.list()]
        active = [job.to_dict() for job in gateway.openai.fine_tuning.jobs.list(limit=20) if job.finished_at is None]
    facts: dict[str, object] = {
        "url": gateway.url,
        "state_dir": str(layout.state_dir),
        "models": [model["id"] for model in models],
        "active_jobs": active,
    }
    if running is not None:
        facts |= {"grpc": running.grpc_address, "pid": running.pid, "processes": _processes(running), "metrics": running.metrics}
    if as_json:
        show(facts, columns=(), as_json=True)
        return
    show(facts, columns=("url", "grpc", "state_dir"), as_json=False)
    if running is not None:
        show(_processes(running), columns=("process", "pid", "state", "memory"), as_json=False)
    show([{"served model": model["id"], "state": _readiness(model)} for model in models], columns=("served model", "state"), as_json=False)
    if active:
        show(active, columns=("id", "status", "model", "created_at"), as_json=False)


def keys(
    action: Annotated[str, typer.Argument(help="create, list, update or revoke.")],
    *,
    project: Annotated[str, typer.Option(help="The project the key is for.")] = "default",
    key_id: Annotated[str | None, typer.Option("--id", help="Which key to update or revoke.")] = None,
    requests_per_minute: Annotated[str | None, typer.Option(help="REST requests a minute; `unlimited` takes the limit away.")] = None,
    tokens_per_minute: Annotated[str | None, typer.Option(help="Prompt and generated tokens a minute.")] = None,
    concurrent_streams: Annotated[str | None, typer.Option(help="Generations at one time.")] = None,
    state_dir: StateDir = None,
) -> None:
    """Manage API keys of this machine's gateway."""
    layout = Layout.of(state_dir)
    running, url = layout.running(), os.environ.get("FINERY_URL")
    if url and state_dir is None and (running is None or running.http_url != url.rstrip("/")):
        fail(
            f"FINERY_URL is {url}, but keys are made where the gateway's database is: run `python -m finery_gateway.keys {action} …` "
            "in its container, or name this machine's installation by --state-dir."
        )
    options = {
        "--project": project,
        "--id": key_id,
        "--requests-per-minute": requests_per_minute,
        "--tokens-per-minute": tokens_per_minute,
        "--concurrent-streams": concurrent_streams,
    }
    given = [word for name, value in options.items() if value is not None for word in (name, value)]
    command = [sys.executable, "-m", "finery_gateway.keys", action, *given]
    done = subprocess.run(command, env={**os.environ, "FINERY_STATE_DIR": str(layout.state_dir)}, check=False)
    raise typer.Exit(done.returncode)


def quickstart(
    *,
    state_dir: StateDir = None,
    port: HttpPort = HTTP_PORT,
    grpc_port: GrpcPort = GRPC_PORT,
) -> None:
    """Run the main job once: upload, prepare, fine-tune, swap in, and compare base and tuned model on held-out questions."""
    layout = Layout.of(state_dir)
    with clear_errors():
        better = run_quickstart(layout, http_port=port, grpc_port=grpc_port)
    raise typer.Exit(0 if better else 1)


def _readiness(model: Mapping[str, object]) -> str:
    return "ready" if model.get("ready") else "vLLM is loading it"


def _up_detached(layout: Layout, *, port: int, grpc_port: int) -> None:
    layout.state_dir.mkdir(parents=True, exist_ok=True)
    log_file = layout.state_dir / "up.log"
    command = [
        sys.executable,
        "-m",
        "finery_cli",
        "up",
        "--state-dir",
        str(layout.state_dir),
        "--port",
        str(port),
        "--grpc-port",
        str(grpc_port),
    ]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline_s = time.monotonic() + 3 * START_S
    with err.status("starting"):
        while (running := layout.running()) is None or running.pid != process.pid:
            if process.poll() is not None or time.monotonic() > deadline_s:
                fail(log_file.read_text().strip().removeprefix("error ") or f"It did not start; see {layout.log_dir}.")
            time.sleep(0.2)
    _say_how_to_go_on(layout, running)


def _say_how_to_go_on(layout: Layout, running: RunningStack) -> None:
    out.print(f"[bold green]Finery is up.[/]  REST {running.http_url}  gRPC {running.grpc_address}  API page {running.http_url}/docs")
    out.print(Text(f"Key: {layout.api_key_file}   Logs: {layout.log_dir}"), soft_wrap=True)
    out.print("vLLM takes about a minute more; `finery status` shows it.")


def _processes(running: RunningStack) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, pid in running.processes.items():
        try:
            process = psutil.Process(pid)
            rows.append({"process": name, "pid": pid, "state": process.status(), "memory": f"{_tree_bytes(process) / 2**20:.0f} MiB"})
        except psutil.NoSuchProcess:
            rows.append({"process": name, "pid": pid, "state": "gone; being restarted"})
    return rows


def _tree_bytes(process: psutil.Process) -> int:
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
