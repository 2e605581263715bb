"""What the benchmarks of the hop share: gateway processes in front of one vLLM, and clients that cost little.

The gateway is the real one (keys, fields, routes, metrics); the serving service is a stand-in that knows one model.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import resource
import socket
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from finery_common.database import Database
from finery_gateway.app import create_app
from finery_gateway.client import ServingClient
from finery_gateway.context import Gateway
from finery_gateway.creates import Creates
from finery_gateway.http_server import HttpServer, listen, loop_factory
from finery_gateway.keys import KeyStore
from finery_gateway.limit_table import LimitTable
from finery_gateway.proxy import Proxy
from finery_gateway.resources import Alias, AliasEvent, Route
from finery_gateway.routes import Routes
from finery_gateway.tables import migrate


@dataclass(frozen=True)
class Target:
    """Where requests go, and with which headers: straight at vLLM or through the gateway."""

    name: str
    address: str | int
    """A Unix socket's path, or a port of this machine."""
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Streams:
    """What one run of streams took; times in seconds."""

    wall_s: float
    first_s: Sequence[float]
    num_events: int
    """Events with a piece of text."""

    def first_ms(self, percent: int) -> float:
        return round(statistics.quantiles(self.first_s, n=100, method="inclusive")[percent - 1] * 1000, 2)

    @property
    def events_per_s(self) -> float:
        return self.num_events / self.wall_s


class Gateways:
    """Gateway processes on one port. `cpu_s` is what they have spent together."""

    def __init__(self, route: Route, *, num_workers: int, folder: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        listener = listen("127.0.0.1", 0)
        self.port = int(listener.getsockname()[1])
        self.key = asyncio.run(_make_key(folder))
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(num_workers):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_run, args=(route, listener, str(folder), theirs))
            process.start()
            self._processes.append(process)
            self._pipes.append(cast("Connection", ours))
        for pipe in self._pipes:
            pipe.recv()
        listener.close()

    def cpu_s(self) -> float:
        for pipe in self._pipes:
            pipe.send(True)
        return sum(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(False)
        for process in self._processes:
            process.join()


class _Serving:
    """Stands in for the serving service: one model, one replica."""

    def __init__(self, route: Route) -> None:
        self._route = route

    async def resolve(self, project: str, *, model: str, after_epoch: int, timeout_s: float) -> Route:
        return self._route

    async def all_aliases(self, project: str) -> AsyncIterator[Alias]:
        return
        yield  # pyright: ignore[reportUnreachable]

    async def watch_aliases(self, project: str) -> AsyncIterator[AliasEvent]:
        await asyncio.Event().wait()
        yield  # pyright: ignore[reportReturnType]


async def _make_key(folder: Path) -> str:
    db = await Database.open(f"sqlite:///{folder}/gateway.sqlite", schema="gateway")
    await migrate(db)
    _, key = await KeyStore(db).create("bench")
    await db.close()
    return key


def _run(route: Route, listener: socket.socket, folder: str, pipe: Connection) -> None:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(route, listener, folder, pipe))


async def _serve(route: Route, listener: socket.socket, folder: str, pipe: Connection) -> None:
    db = await Database.open(f"sqlite:///{folder}/gateway.sqlite", schema="gateway")
    nothing = cast("Any", None)
    proxy = Proxy(Routes(cast("ServingClient", _Serving(route)), training=nothing, cold_wait_s=5), secret="s" * 40, timeout_s=60)
    files = cast("Any", type("NoFiles", (), {"limit_bytes": 1})())
    limits = LimitTable.open(Path(folder) / "limits")
    gateway = Gateway(db, nothing, KeyStore(db), limits, Creates(db), files, nothing, nothing, nothing, nothing, proxy)
    server = HttpServer(create_app(gateway, body_limit_bytes=1 << 20))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110 - uvicorn tells in no other way
        await asyncio.sleep(0.01)
    pipe.send(True)
    while await asyncio.to_thread(pipe.recv):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send(usage.ru_utime + usage.ru_stime)
    server.should_exit = True
    await serving
    await proxy.close()
    await db.close()


async def run_streams(
    targets: Sequence[Target], path: str, bodies: Sequence[Sequence[bytes]], *, spread_s: float, pause_s: float = 0.0, seed: int = 0
) -> dict[str, Streams]:
    """As many streams at a time as `bodies` has rows, each asking with one after the other, their starts spread evenly over `spread_s`.

    Of several targets each request goes to one by lot, so that all of them see the same load; what comes back is by name. Before each
    request a stream waits up to `pause_s`, by lot: answers end where the engine's steps do, and the next requests would come in step.
    """
    lots = random.Random(seed)
    plans = [[(body, lots.choice(targets), lots.uniform(0, pause_s)) for body in row] for row in bodies]
    found: dict[str, list[tuple[float, int]]] = {target.name: [] for target in targets}

    async def stream(number: int) -> None:
        await asyncio.sleep(spread_s * number / len(bodies))
        for body, target, wait_s in plans[number]:
            await asyncio.sleep(wait_s)
            found[target.name].append(await _read(target, path, body))

    started_s = time.perf_counter()
    await asyncio.gather(*map(stream, range(len(bodies))))
    wall_s = time.perf_counter() - started_s
    return {name: Streams(wall_s, [first for first, _ in each], sum(seen for _, seen in each)) for name, each in found.items()}


async def _read(target: Target, path: str, body: bytes) -> tuple[float, int]:
    """One request by hand, so that the client costs little; answers seconds to the first text, and events with text."""
    address = target.address
    opened = asyncio.open_unix_connection(address) if isinstance(address, str) else asyncio.open_connection("127.0.0.1", address)
    started_s = time.perf_counter()
    reader, writer = await opened
    lines = [f"POST {path} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in target.headers.items())]
    lines += ["content-type: application/json", f"content-length: {len(body)}", "connection: close"]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    first_s, seen, tail = 0.0, 0, b""
    while data := await reader.read(1 << 18):
        seen += data.count(b'"finish_reason"')
        tail = (tail + data)[-200:]
        if not first_s and seen:
            first_s = time.perf_counter() - started_s
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    assert b"[DONE]" in tail, tail
    return first_s, seen


def through(gateways: Gateways) -> Target:
    """The target in front of `gateways`."""
    return Target("gateway", gateways.port, {"authorization": f"Bearer {gateways.key}"})
