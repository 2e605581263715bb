"""Runs the gateway: REST on one port, by workers where several are wanted, the public gRPC services on another, metrics on a third."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable

import structlog

from finery_common.rpc.server import DRAIN_S
from finery_common.rpc.tokens import TokenSigner
from finery_common.service import run_service, until_stopped
from finery_common.telemetry import serve_metrics
from finery_gateway.app import create_app, doing_chores
from finery_gateway.context import Gateway
from finery_gateway.http_server import HttpServer, listen, loop_factory
from finery_gateway.server import PublicRpc
from finery_gateway.settings import GatewaySettings
from finery_gateway.wiring import open_gateway, targets_of
from finery_gateway.workers import Workers

log = structlog.get_logger("finery_gateway")


def main() -> int:
    """Runs the service; answers the exit status."""
    return run_service("gateway", GatewaySettings, _run, loop_factory=loop_factory())


async def _run(settings: GatewaySettings) -> None:
    listener = listen(settings.http_host, settings.http_port)
    metrics_port = serve_metrics(host=settings.metrics_host, port=settings.metrics_port)
    async with open_gateway(settings, migrates=True) as gateway:
        if await gateway.keys.ensure_first(settings.state_dir / "api_key"):
            log.info("made the first API key", file=str(settings.state_dir / "api_key"))
        signer = TokenSigner(settings.token_secret())
        rpc = PublicRpc(address=settings.grpc_address, targets=targets_of(settings), keys=gateway.keys, signer=signer)
        grpc_port = await rpc.start()
        port, num_workers = listener.getsockname()[1], settings.num_workers
        log.info("serving HTTP", port=port, grpc_port=grpc_port, metrics_port=metrics_port, workers=num_workers)
        http, stop = _start_http(settings, gateway, listener)
        async with doing_chores(gateway):
            try:
                await until_stopped([http])
            finally:
                await asyncio.gather(stop(), rpc.stop(drain_s=DRAIN_S - 2))


def _start_http(
    settings: GatewaySettings, gateway: Gateway, listener: socket.socket
) -> tuple[asyncio.Task[None], Callable[[], Awaitable[None]]]:
    """Answers HTTP, here or by workers; with what runs, how to drain and end it."""
    if settings.num_workers > 1:
        workers = asyncio.create_task(Workers(listener, count=settings.num_workers).run(), name="workers")

        async def stop_workers() -> None:
            workers.cancel()
            await asyncio.gather(workers, return_exceptions=True)

        return workers, stop_workers
    server = HttpServer(create_app(gateway, body_limit_bytes=settings.body_limit_bytes, log_content=settings.log_content))
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")

    async def stop_serving() -> None:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)

    return serving, stop_serving


if __name__ == "__main__":
    sys.exit(main())
