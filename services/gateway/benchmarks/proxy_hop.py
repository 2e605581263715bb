"""What the gateway's hop costs: CPU a piece of a stream, and what it adds to the first byte.

    python services/gateway/benchmarks/proxy_hop.py [--streams 64 256] [--workers 1 2] [--chunks 128] [--step-ms 50]

A fake vLLM on a Unix socket gives every stream one event a step, as an engine does; clients read them straight from it and through the
gateway, in turns. Starts are spread over the length of a stream, as they are in a running system; --burst starts all at once. Clients and
the fake run on the same machine and cost as much as the gateway: with fewer than four free cores only the CPU times mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvicorn
from harness import Gateways, Streams, Target, run_streams, through

from finery_gateway.http_server import loop_factory
from finery_gateway.resources import Route, RouteReplica, RouteTarget

MODEL = "bench"
PATH = "/v1/chat/completions"
_EVENT = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
_CHOICE = {"index": 0, "delta": {"content": " token"}, "logprobs": None, "finish_reason": None}
_CHUNK = f"data: {json.dumps({**_EVENT, 'choices': [_CHOICE]})}\n\n".encode()
_REPEATS = 3


async def _fake_vllm(scope: dict[str, Any], receive: Any, send: Any) -> None:
    # The step's length travels in a field that the gateway passes on.
    body = json.loads((await receive())["body"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for _ in range(body["max_tokens"]):
        await send({"type": "http.response.body", "body": _CHUNK, "more_body": True})
        await asyncio.sleep(body["min_p"])
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _run_vllm(uds: str) -> None:
    server = uvicorn.Server(uvicorn.Config(_fake_vllm, uds=uds, log_config=None, access_log=False, lifespan="off"))
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(server.serve())


def _body(*, num_chunks: int, step_s: float) -> bytes:
    fields = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": num_chunks, "min_p": step_s}
    return json.dumps(fields).encode()


def _measure(arguments: argparse.Namespace, uds: str, *, num_workers: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        replica = RouteReplica(address=f"unix://{uds}", token="bench")
        route = Route(targets=(RouteTarget(version=MODEL, weight=100, replicas=(replica,)),))
        gateways = Gateways(route, num_workers=num_workers, folder=Path(folder))
        straight, hop = Target("straight", uds, {}), through(gateways)
        step_s = arguments.step_ms / 1000
        for target in (straight, hop):
            _streams(target, [_body(num_chunks=20, step_s=0)] * 8, spread_s=0)
        for num_streams in arguments.streams:
            bodies = [_body(num_chunks=arguments.chunks, step_s=step_s)] * num_streams
            spread_s = 0 if arguments.burst else arguments.chunks * step_s
            alone = _streams(straight, bodies, spread_s=spread_s)
            before_s = gateways.cpu_s()
            passed = _streams(hop, bodies, spread_s=spread_s)
            spent_s = gateways.cpu_s() - before_s
            # Requests of one piece each tell what a request costs without its stream.
            short = [_body(num_chunks=1, step_s=0)] * 8
            before_s = gateways.cpu_s()
            _streams(hop, short, spread_s=0, repeats=25)
            request_s = (gateways.cpu_s() - before_s) / 200
            rows.append(_row(num_workers, num_streams, alone=alone, passed=passed, spent_s=spent_s, request_s=request_s))
        gateways.close()
    return rows


def _streams(target: Target, bodies: list[bytes], *, spread_s: float, repeats: int = _REPEATS) -> Streams:
    return asyncio.run(run_streams([target], PATH, [[body] * repeats for body in bodies], spread_s=spread_s))[target.name]


def _row(num_workers: int, num_streams: int, *, alone: Streams, passed: Streams, spent_s: float, request_s: float) -> dict[str, object]:
    num_requests = len(passed.first_s)
    chunk_s = (spent_s - request_s * num_requests) / passed.num_events
    return {
        "workers": num_workers,
        "streams": num_streams,
        "straight_chunks_per_s": round(alone.events_per_s),
        "gateway_chunks_per_s": round(passed.events_per_s),
        "cpu_us_per_chunk": round(chunk_s * 1e6, 1),
        "chunks_per_s_a_core": round(1 / chunk_s),
        "cpu_ms_per_request": round(request_s * 1000, 2),
        "first_byte_ms_p50": [alone.first_ms(50), passed.first_ms(50)],
        "first_byte_ms_p99": [alone.first_ms(99), passed.first_ms(99)],
    }


def main() -> None:
    """Prints one JSON object a row; pairs are straight and through the gateway."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--chunks", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--burst", action="store_true")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        uds = str(Path(folder) / "vllm.sock")
        vllm = spawn.Process(target=_run_vllm, args=(uds,))
        vllm.start()
        try:
            while not Path(uds).exists():
                time.sleep(0.05)
            faster = [name for name in ("uvloop", "httptools") if importlib.util.find_spec(name)]
            about = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0], "with": faster}
            sys.stdout.write(json.dumps(about) + "\n")
            for num_workers in arguments.workers:
                for row in _measure(arguments, uds, num_workers=num_workers):
                    sys.stdout.write(json.dumps(row) + "\n")
                    sys.stdout.flush()
        finally:
            vllm.terminate()
            vllm.join()


if __name__ == "__main__":
    main()
