"""`python -m finery_dataprep`: wires the service from the environment and runs it until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from functools import partial

from finery_common.artifacts import ArtifactStore
from finery_common.catalogue import Catalogue, materialize
from finery_common.database import Database
from finery_common.errors import FailedPreconditionError
from finery_common.jobs import JobStore, migrate
from finery_common.rpc.server import RpcServer, token_authenticator
from finery_common.rpc.tokens import TokenSigner
from finery_common.service import run_service, until_stopped
from finery_common.telemetry import serve_metrics
from finery_dataprep.runner import DatasetRunner
from finery_dataprep.server import DatasetServicer, servicer_of
from finery_dataprep.settings import DataprepSettings


def main() -> int:
    """Runs the service; answers the exit status."""
    return run_service("dataprep", DataprepSettings, _serve)


async def _serve(settings: DataprepSettings) -> None:
    if settings.catalogue is None:
        raise FailedPreconditionError("FINERY_CATALOGUE is not set; set it to the YAML file of base models.")
    catalogue = Catalogue.load(settings.catalogue)
    signer = TokenSigner(settings.token_secret())
    artifacts = await asyncio.to_thread(ArtifactStore.connect, settings.s3())
    database = await Database.open(settings.service_database_url("dataprep"), schema="dataprep")
    try:
        await migrate(database)
        serve_metrics(host=settings.metrics_host, port=settings.metrics_port)
        jobs = JobStore(database, kind="dataset", id_prefix="ds-")
        runner = DatasetRunner(
            jobs,
            artifacts=artifacts,
            base_folder=lambda name: materialize(catalogue.get(name), cache_dir=settings.artifact_cache_dir, store=artifacts),
            scratch_dir=settings.scratch_dir,
            holder=f"{socket.gethostname()}:{os.getpid()}",
            max_workers=settings.dataprep_workers,
        )
        context_limit = partial(_context_limit, catalogue)
        servicer = DatasetServicer(jobs, artifacts=artifacts, runner=runner, context_limit=context_limit)
        server = RpcServer(address=settings.grpc_address, servicers=[servicer_of(servicer)], authenticate=token_authenticator(signer))
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


def _context_limit(catalogue: Catalogue, name: str) -> int:
    return catalogue.get(name).max_sequence_length


if __name__ == "__main__":
    sys.exit(main())
