"""Runs the gateway: REST on one port, by workers where several are wanted, the public gRPC services on another, metrics on a third."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator

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
        try:
            async with _answering(settings, gateway, listener) as http:
                await until_stopped([http])
        finally:
            await rpc.stop(drain_s=DRAIN_S - 2)


@contextlib.asynccontextmanager
async def _answering(settings: GatewaySettings, gateway: Gateway, listener: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
    """Answers HTTP, here or by workers, and drains at the end."""
    if settings.num_workers > 1:
        workers = asyncio.create_task(Workers(listener, count=settings.num_workers).run(), name="workers")
        try:
            async with doing_chores(gateway):
                yield workers
        finally:
            workers.cancel()
            await asyncio.gather(workers, return_exceptions=True)
        return
    server = HttpServer(create_app(gateway, body_limit_bytes=settings.body_limit_bytes))
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        yield serving
    finally:
        server.should_exit = True
        await serving


if __name__ == "__main__":
    sys.exit(main())
