"""Several processes that answer HTTP on one port.

`Workers` starts them on the listening socket, starts again what ends, and ends them; `python -m finery_gateway.workers FD NUMBER` is one of
them. A worker has routes, remembered keys and connections of its own. What must be single (migrations, the first key, gRPC, chores) is the
parent's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from finery_common.leash import leashed
from finery_common.service import run_service, until_stopped
from finery_common.telemetry import announce_metrics, serve_metrics
from finery_gateway.app import create_app
from finery_gateway.http_server import HTTP_DRAIN_S, HttpServer, loop_factory
from finery_gateway.settings import GatewaySettings
from finery_gateway.wiring import open_gateway

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 10.0
_STEADY_S = 30.0
# A worker has this much longer than its requests before it is killed.
_STOP_MARGIN_S = 2.0

log = structlog.get_logger("finery_gateway")


class Workers:
    """Keeps `count` workers running on `listener`."""

    def __init__(self, listener: socket.socket, *, count: int) -> None:
        self._listener = listener
        self._count = count

    async def run(self) -> None:
        """Runs until cancelled; then every worker drains and ends."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._count):
                group.create_task(self._keep(number))

    async def _keep(self, number: int) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started_s = time.monotonic()
            code = await self._life(number)
            backoff_s = _FIRST_BACKOFF_S if time.monotonic() - started_s > _STEADY_S else min(backoff_s * 2, _MAX_BACKOFF_S)
            log.error("a worker ended; starting it again", worker=number, exit_code=code, backoff_s=backoff_s)
            await asyncio.sleep(backoff_s)

    async def _life(self, number: int) -> int:
        process = _spawn(self._listener.fileno(), number)
        log.info("a worker starts", worker=number, pid=process.pid)
        try:
            return await _ended(process)
        finally:
            await _end(process)


def _spawn(descriptor: int, number: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "finery_gateway.workers", str(descriptor), str(number)]
    # Not by the loop: uvloop forks, of which gRPC's threads complain on standard error.
    return subprocess.Popen(leashed(command, number=signal.SIGTERM), pass_fds=[descriptor])


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Waits for the end of `process`; answers its exit status."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return process.wait()


async def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(HTTP_DRAIN_S + _STOP_MARGIN_S):
            await _ended(process)
    except TimeoutError:
        process.kill()
        await _ended(process)


def main(descriptor: int, number: int) -> int:
    """One worker; answers the exit status."""

    async def serve(settings: GatewaySettings) -> None:
        await _serve(settings, descriptor=descriptor, number=number)

    return run_service("gateway", GatewaySettings, serve, loop_factory=loop_factory())


async def _serve(settings: GatewaySettings, *, descriptor: int, number: int) -> None:
    structlog.contextvars.bind_contextvars(worker=number)
    listener = socket.socket(fileno=descriptor)
    # The parent has the port that the settings name; Prometheus finds this one by its file.
    metrics_port = serve_metrics(host=settings.metrics_host, port=0)
    async with open_gateway(settings, migrates=False) as gateway:
        server = HttpServer(create_app(gateway, body_limit_bytes=settings.body_limit_bytes, log_content=settings.log_content))
        with _announced(settings, number=number, port=metrics_port):
            serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")
            log.info("a worker serves HTTP", metrics_port=metrics_port)
            try:
                await until_stopped([serving])
            finally:
                server.should_exit = True
                await serving


@contextlib.contextmanager
def _announced(settings: GatewaySettings, *, number: int, port: int) -> Iterator[None]:
    file, address = targets_file(settings.state_dir, number), f"{settings.metrics_host}:{port}"
    try:
        announce_metrics(file, address=address, service="gateway-worker")
    except OSError as error:
        log.warning("Prometheus cannot be told of this worker", error=str(error))
    try:
        yield
    finally:
        # Where this one's parent was killed, the file may be its successor's already.
        with contextlib.suppress(OSError):
            if f'"{address}"' in file.read_text():
                file.unlink()


def targets_file(state_dir: Path, number: int) -> Path:
    """Where Prometheus reads of worker `number`."""
    return state_dir / "prometheus" / f"gateway-worker-{number}.json"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
