"""Runs the gateway: REST on one port, the public gRPC services on another, metrics on a third."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Iterator

import structlog
import uvicorn
from fastapi import FastAPI
from prometheus_client import REGISTRY

from finery_common.artifacts import ArtifactStore
from finery_common.database import Database
from finery_common.errors import FailedPreconditionError
from finery_common.rpc.channel import ServiceChannel
from finery_common.rpc.server import DRAIN_S
from finery_common.rpc.tokens import TokenSigner
from finery_common.service import run_service, until_stopped
from finery_common.telemetry import serve_metrics
from finery_gateway.app import create_app
from finery_gateway.client import ConversionClient, DatasetClient, ServingClient, TrainingClient
from finery_gateway.context import Gateway
from finery_gateway.creates import Creates
from finery_gateway.files import Files
from finery_gateway.keys import KeyStore
from finery_gateway.limit_table import LimitTable
from finery_gateway.proxy import Proxy
from finery_gateway.routes import Routes
from finery_gateway.server import CALLER, PublicRpc, Targets
from finery_gateway.settings import GatewaySettings
from finery_gateway.tables import migrate

log = structlog.get_logger("finery_gateway")


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: one place decides when both servers stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main() -> int:
    """Runs the service; answers the exit status."""
    return run_service("gateway", GatewaySettings, _run)


async def _run(settings: GatewaySettings) -> None:
    listener = _listen(settings)
    metrics_port = serve_metrics(host=settings.metrics_host, port=settings.metrics_port)
    async with _gateway(settings) as (gateway, rpc):
        if await gateway.keys.ensure_first(settings.state_dir / "api_key"):
            log.info("made the first API key", file=str(settings.state_dir / "api_key"))
        app = create_app(gateway, body_limit_bytes=settings.body_limit_bytes, log_content=settings.log_content)
        grpc_port = await rpc.start()
        log.info("serving HTTP", port=listener.getsockname()[1], grpc_port=grpc_port, metrics_port=metrics_port)
        await _serve(app, rpc, listener)


@contextlib.asynccontextmanager
async def _gateway(settings: GatewaySettings) -> AsyncIterator[tuple[Gateway, PublicRpc]]:
    secret = settings.token_secret()
    signer = TokenSigner(secret)
    targets = _targets(settings)
    async with contextlib.AsyncExitStack() as stack:
        limits = LimitTable.open(settings.limits_file)
        stack.callback(limits.close)
        db = await Database.open(settings.service_database_url("gateway"), schema="gateway")
        stack.push_async_callback(db.close)
        await migrate(db)
        store = await asyncio.to_thread(ArtifactStore.connect, settings.s3())
        channels = {
            area: ServiceChannel(target, signer=signer, caller=CALLER)
            for area, target in (
                ("training", targets.training),
                ("dataset", targets.dataset),
                ("conversion", targets.conversion),
                ("serving", targets.serving),
            )
        }
        for channel in channels.values():
            stack.push_async_callback(channel.close)
        keys, creates = KeyStore(db), Creates(db)
        serving, training = ServingClient(channels["serving"]), TrainingClient(channels["training"])
        routes = Routes(serving, training=training, cold_wait_s=settings.cold_wait_s)
        proxy = Proxy(routes, secret=secret, timeout_s=settings.generation_timeout_s)
        stack.push_async_callback(proxy.close)
        REGISTRY.register(proxy.reports)
        stack.callback(REGISTRY.unregister, proxy.reports)
        gateway = Gateway(
            db=db,
            store=store,
            keys=keys,
            limits=limits,
            creates=creates,
            files=Files(db, store=store, creates=creates, limit_bytes=settings.upload_limit_bytes),
            training=training,
            datasets=DatasetClient(channels["dataset"]),
            conversions=ConversionClient(channels["conversion"]),
            serving=serving,
            proxy=proxy,
        )
        yield gateway, PublicRpc(address=settings.grpc_address, targets=targets, keys=keys, signer=signer)


async def _serve(app: FastAPI, rpc: PublicRpc, listener: socket.socket) -> None:
    """Serves both until a signal, then drains both."""
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=int(DRAIN_S) - 2)
    http = _HttpServer(config)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    try:
        await until_stopped([serving])
    finally:
        http.should_exit = True
        await asyncio.gather(serving, rpc.stop(drain_s=DRAIN_S - 2))


def _listen(settings: GatewaySettings) -> socket.socket:
    """Takes the HTTP port before anything else is started. Raises FailedPreconditionError where it is in use."""
    address = f"{settings.http_host}:{settings.http_port}"
    family = socket.AF_INET6 if ":" in settings.http_host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.http_host, settings.http_port))
    except OSError as error:
        listener.close()
        raise FailedPreconditionError(f"FINERY_HTTP_PORT: cannot listen on {address}: {error.strerror}; choose a free port.") from error
    return listener


def _targets(settings: GatewaySettings) -> Targets:
    """Raises FailedPreconditionError that names every address that is not set."""
    addresses = {
        "FINERY_DATAPREP_ADDRESS": settings.dataprep_address,
        "FINERY_TRAINER_ADDRESS": settings.trainer_address,
        "FINERY_CONVERTER_ADDRESS": settings.converter_address,
        "FINERY_SERVING_ADDRESS": settings.serving_address,
        "FINERY_S3_ENDPOINT": settings.s3_endpoint,
    }
    if missing := [name for name, value in addresses.items() if not value]:
        raise FailedPreconditionError(f"{', '.join(missing)}: not set; wanted the host:port of each inner service and of the object store.")
    return Targets(
        dataset=settings.dataprep_address,
        training=settings.trainer_address,
        conversion=settings.converter_address,
        serving=settings.serving_address,
    )


if __name__ == "__main__":
    sys.exit(main())
