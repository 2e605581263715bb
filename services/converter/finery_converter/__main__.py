"""The converter's process: `python -m finery_converter`. Wires settings, store, database, runner and server; owns nothing else."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import structlog

from finery_common.artifacts import ArtifactStore
from finery_common.catalogue import Catalogue
from finery_common.database import Database
from finery_common.errors import FailedPreconditionError
from finery_common.jobs import JobStore, migrate
from finery_common.rpc.server import RpcServer, token_authenticator
from finery_common.rpc.tokens import TokenSigner
from finery_common.service import run_service, until_stopped
from finery_common.telemetry import serve_metrics
from finery_converter.attempt import Workplace
from finery_converter.runner import ConversionRunner
from finery_converter.server import ConversionServicer, servicer_of
from finery_converter.settings import ConverterSettings
from finery_converter.sources import Sources

log = structlog.get_logger(__name__)


async def serve(settings: ConverterSettings) -> None:
    """Serves until SIGTERM. Raises FineryError where it cannot start."""
    if settings.catalogue is None:
        raise FailedPreconditionError("FINERY_CATALOGUE is not set; set it to the YAML file of base models.")
    catalogue = Catalogue.load(settings.catalogue)
    authenticate = token_authenticator(TokenSigner(settings.token_secret()))
    artifacts = await asyncio.to_thread(ArtifactStore.connect, settings.s3())
    database = await Database.open(settings.service_database_url("converter"), schema="converter")
    try:
        await migrate(database)
        jobs = JobStore(database, kind="conversion", id_prefix="conv-")
        sources = Sources(artifacts, catalogue=catalogue, cache_dir=settings.artifact_cache_dir)
        workplace = Workplace(jobs, artifacts, sources, settings)
        runner = ConversionRunner(workplace, holder=f"{socket.gethostname()}:{os.getpid()}")
        servicer = servicer_of(ConversionServicer(jobs, artifacts=artifacts, sources=sources, runner=runner, settings=settings))
        server = RpcServer(address=settings.grpc_address, servicers=[servicer], authenticate=authenticate)
        log.info("serving metrics", port=serve_metrics(host=settings.metrics_host, port=settings.metrics_port))
        await server.start()
        running = asyncio.create_task(runner.run())
        try:
            await until_stopped([running])
            await server.stop()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    finally:
        await database.close()


def main() -> int:
    """Runs the service; answers the exit status."""
    return run_service("converter", ConverterSettings, serve)


if __name__ == "__main__":
    sys.exit(main())
