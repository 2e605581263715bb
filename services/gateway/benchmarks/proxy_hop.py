"""What the gateway's hop costs: chunks a second a core, and what it adds to the first byte.

    python services/gateway/benchmarks/proxy_hop.py [--streams 64] [--chunks 500] [--step-ms 10]

A fake vLLM on a Unix socket gives every stream one event a step, as an engine does; clients read them straight from it and through the
gateway. With --step-ms 0 it is as fast as it can, and events reach the gateway several at a time. The gateway has its own process, so its
CPU time is its own. Keys, routes and metrics are the real ones; the serving service is a stand-in.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import multiprocessing
import platform
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import uvicorn

from finery_common.database import Database
from finery_common.telemetry import configure_logging
from finery_gateway.app import create_app
from finery_gateway.client import ServingClient
from finery_gateway.context import Gateway
from finery_gateway.creates import Creates
from finery_gateway.keys import KeyStore
from finery_gateway.limit_table import LimitTable
from finery_gateway.proxy import Proxy
from finery_gateway.resources import Alias, AliasEvent, Route
from finery_gateway.routes import Routes
from finery_gateway.tables import migrate

MODEL = "bench"
_DELTA = {"role": None, "content": " token"}
_EVENT = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
_CHUNK = f"data: {json.dumps({**_EVENT, 'choices': [{'index': 0, 'delta': _DELTA, 'finish_reason': None}]})}\n\n".encode()
_WARM_UP_CHUNKS = 200
_SAMPLES = 200


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Serving:
    """Stands in for the serving service: one model, one replica."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def resolve(self, project: str, *, model: str, after_epoch: int, timeout_s: float) -> Route:
        return Route(version=MODEL, replica_address=self._address, replica_token="bench")

    async def all_aliases(self, project: str) -> AsyncIterator[Alias]:
        return
        yield  # pyright: ignore[reportUnreachable]

    async def watch_aliases(self, project: str) -> AsyncIterator[AliasEvent]:
        await asyncio.Event().wait()
        yield  # pyright: ignore[reportReturnType]


async def _fake_vllm(scope: dict[str, Any], receive: Any, send: Any) -> None:
    # The step's length travels in a field that the gateway passes on.
    body = json.loads((await receive())["body"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for _ in range(body["max_tokens"]):
        await send({"type": "http.response.body", "body": _CHUNK, "more_body": True})
        await asyncio.sleep(body["min_p"])
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _run_vllm(uds: str) -> None:
    asyncio.run(_Server(uvicorn.Config(_fake_vllm, uds=uds, log_config=None, access_log=False, lifespan="off")).serve())


def _run_gateway(uds: str, folder: str, pipe: Connection) -> None:
    # It logs as the service does, but not onto the screen.
    sys.stderr = (Path(folder) / "gateway.log").open("w")
    configure_logging("gateway")
    asyncio.run(_gateway(uds, folder, pipe))


async def _gateway(uds: str, folder: str, pipe: Connection) -> None:
    db = await Database.open(f"sqlite:///{folder}/gateway.sqlite", schema="gateway")
    await migrate(db)
    keys = KeyStore(db)
    limits = LimitTable.open(Path(folder) / "limits")
    _, key = await keys.create("bench")
    nothing = cast("Any", None)
    routes = Routes(cast("ServingClient", _Serving(f"unix://{uds}")), training=nothing, cold_wait_s=5)
    proxy = Proxy(routes, secret="s" * 40, timeout_s=60)
    files = cast("Any", type("NoFiles", (), {"limit_bytes": 1, "settle": lambda _: asyncio.sleep(0)})())
    gateway = Gateway(db, nothing, keys, limits, Creates(db), files, nothing, nothing, nothing, nothing, proxy)
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Server(uvicorn.Config(create_app(gateway, body_limit_bytes=1 << 20), log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    pipe.send((listener.getsockname()[1], key))
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, pipe.recv):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send(usage.ru_utime + usage.ru_stime)
    server.should_exit = True
    await serving
    await proxy.close()
    await db.close()


async def _read(address: str | int, *, key: str, num_chunks: int, step_s: float) -> tuple[float, int]:
    """One stream by hand, so that the client costs little; answers seconds to the first event, and events seen."""
    opened = asyncio.open_unix_connection(address) if isinstance(address, str) else asyncio.open_connection("127.0.0.1", address)
    reader, writer = await opened
    fields = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": num_chunks, "min_p": step_s}
    body = json.dumps(fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    started_s = time.perf_counter()
    writer.write(head.encode() + f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
    first_s, seen, tail = 0.0, 0, b""
    while data := await reader.read(1 << 18):
        seen += data.count(b'"delta"')
        tail = (tail + data)[-64:]
        if not first_s and seen:
            first_s = time.perf_counter() - started_s
    writer.close()
    assert b"[DONE]" in tail, tail
    return first_s, seen


async def _measure(address: str | int, *, key: str, num_streams: int, num_chunks: int, step_s: float) -> tuple[float, int]:
    started_s = time.perf_counter()
    results = await asyncio.gather(*(_read(address, key=key, num_chunks=num_chunks, step_s=step_s) for _ in range(num_streams)))
    return time.perf_counter() - started_s, sum(seen for _, seen in results)


async def _first_byte_ms(address: str | int, *, key: str) -> float:
    return statistics.median([(await _read(address, key=key, num_chunks=1, step_s=0))[0] for _ in range(_SAMPLES)]) * 1000


async def _compare(
    uds: str, port: int, key: str, pipe: Connection, *, num_streams: int, num_chunks: int, step_s: float
) -> dict[str, object]:
    def cpu_s() -> float:
        pipe.send(True)
        return pipe.recv()

    for address in (uds, port):
        await _measure(address, key=key, num_streams=4, num_chunks=_WARM_UP_CHUNKS, step_s=0)
    straight_s, straight_seen = await _measure(uds, key=key, num_streams=num_streams, num_chunks=num_chunks, step_s=step_s)
    before_s = await asyncio.to_thread(cpu_s)
    through_s, seen = await _measure(port, key=key, num_streams=num_streams, num_chunks=num_chunks, step_s=step_s)
    spent_s = await asyncio.to_thread(cpu_s) - before_s
    straight_ms = await _first_byte_ms(uds, key=key)
    before_s = await asyncio.to_thread(cpu_s)
    through_ms = await _first_byte_ms(port, key=key)
    request_ms = (await asyncio.to_thread(cpu_s) - before_s) / _SAMPLES * 1000
    versions = {name: importlib.metadata.version(name) for name in ("uvicorn", "starlette", "httpx")}
    return {
        "streams": num_streams,
        "chunks_per_stream": num_chunks,
        "step_ms": step_s * 1000,
        "straight_chunks_per_s": round(straight_seen / straight_s),
        "gateway_chunks_per_s": round(seen / through_s),
        "gateway_chunks_per_cpu_s": round(seen / spent_s),
        "gateway_cpu_us_per_chunk": round(spent_s / seen * 1e6, 1),
        "gateway_cpu_ms_per_request": round(request_ms, 2),
        "first_byte_ms_p50_straight": round(straight_ms, 2),
        "first_byte_ms_p50_gateway": round(through_ms, 2),
        "first_byte_ms_p50_added": round(through_ms - straight_ms, 2),
        "machine": f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} cores, Python {platform.python_version()}",
        "versions": versions,
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=500)
    parser.add_argument("--step-ms", type=float, default=10.0)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        uds = str(Path(folder) / "vllm.sock")
        ours, theirs = spawn.Pipe()
        processes = [spawn.Process(target=_run_vllm, args=(uds,)), spawn.Process(target=_run_gateway, args=(uds, folder, theirs))]
        for process in processes:
            process.start()
        try:
            port, key = ours.recv()
            while not Path(uds).exists():
                time.sleep(0.05)
            measured = _compare(
                uds,
                port,
                key,
                cast("Connection", ours),
                num_streams=arguments.streams,
                num_chunks=arguments.chunks,
                step_s=arguments.step_ms / 1000,
            )
            report = asyncio.run(measured)
            sys.stdout.write(json.dumps(report, indent=2) + "\n")
        finally:
            for process in processes:
                process.terminate()
                process.join()


if __name__ == "__main__":
    main()
