"""The training service: reads settings, wires its parts, serves until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys

import structlog

from finery_common.artifacts import ArtifactStore
from finery_common.catalogue import Catalogue
from finery_common.database import Database
from finery_common.errors import FailedPreconditionError, FineryError
from finery_common.jobs import JobStore, migrate
from finery_common.rpc.channel import ServiceChannel
from finery_common.rpc.server import RpcServer, token_authenticator
from finery_common.rpc.tokens import TokenSigner
from finery_common.telemetry import configure_logging, serve_metrics
from finery_trainer.attempts import Attempts
from finery_trainer.client import DataprepClient, ServingClient
from finery_trainer.deployment import Deployments
from finery_trainer.launchers.local import LocalLauncher
from finery_trainer.requests import RequestChecks
from finery_trainer.runs import Runs
from finery_trainer.scheduler import Scheduler
from finery_trainer.server import TrainingServicer, WorkerServicer, servicers
from finery_trainer.settings import TrainerSettings, s3_settings
from finery_trainer.validation import Validation

WORKERS_STOP_S, DRAIN_S = 12.0, 6.0

log = structlog.get_logger(__name__)


async def serve(settings: TrainerSettings) -> None:
    """Serves until SIGTERM or SIGINT; then workers save their states, and requests under way end. Raises FineryError where it cannot start."""
    async with contextlib.AsyncExitStack() as stack:
        if settings.catalogue is None:
            raise FailedPreconditionError("FINERY_CATALOGUE is not set; set it to the YAML file of base models.")
        catalogue = Catalogue.load(settings.catalogue)
        artifacts = await asyncio.to_thread(ArtifactStore.connect, s3_settings(settings))
        db = await Database.open(settings.service_database_url("trainer"), schema="trainer")
        stack.push_async_callback(db.close)
        await migrate(db)
        jobs = JobStore(db, kind="training", id_prefix="ftjob-")
        signer = TokenSigner(settings.token_secret())

        def channel(address: str) -> ServiceChannel:
            opened = ServiceChannel(address, signer=signer, caller="trainer")
            stack.push_async_callback(opened.close)
            return opened

        dataprep = DataprepClient(channel(settings.dataprep_address))
        serving = ServingClient(channel(settings.serving_address)) if settings.serving_address else None
        launcher = LocalLauncher(log_dir=settings.state_dir / "logs")
        validation = Validation(jobs, dataprep=dataprep, lease_s=settings.lease_s)
        holder = f"trainer@{socket.gethostname()}:{os.getpid()}"
        scheduler = Scheduler(jobs, launcher=launcher, validation=validation, signer=signer, settings=settings, holder=holder)
        checks = RequestChecks(catalogue=catalogue, artifacts=artifacts, serving=serving)
        runs = Runs(jobs, artifacts=artifacts, checks=checks, serving=serving, wake=scheduler.wake)
        attempts = Attempts(jobs, artifacts=artifacts, lease_s=settings.lease_s, serves=serving is not None, wake=scheduler.wake)
        server = RpcServer(
            address=settings.grpc_address,
            servicers=servicers(
                TrainingServicer(runs, catalogue=catalogue, cache_dir=settings.artifact_cache_dir), WorkerServicer(attempts)
            ),
            authenticate=token_authenticator(signer),
        )
        port = await server.start()
        launcher.point_at(f"{settings.grpc_address.rpartition(':')[0]}:{port}")
        metrics_port = serve_metrics(host=settings.metrics_host, port=settings.metrics_port)
        log.info("serving metrics", port=metrics_port)
        background = [asyncio.create_task(scheduler.run())]
        if serving is not None:
            background.append(asyncio.create_task(Deployments(jobs, serving=serving).run()))
        await _until_stopped(background)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await launcher.stop_all(grace_s=WORKERS_STOP_S)
        await scheduler.take_exits()
        await server.stop(drain_s=DRAIN_S)


def main() -> int:
    """The process; answers its exit status."""
    try:
        settings = TrainerSettings()
        configure_logging("trainer", level=settings.log_level)
        asyncio.run(serve(settings))
    except FineryError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1
    return 0


async def _until_stopped(background: list[asyncio.Task[None]]) -> None:
    """Waits for SIGTERM or SIGINT. A background task never ends by itself: its error ends the service, which its supervisor restarts."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    waiter = asyncio.create_task(stopped.wait())
    done, _ = await asyncio.wait([waiter, *background], return_when=asyncio.FIRST_COMPLETED)
    for task in done - {waiter}:
        task.result()


if __name__ == "__main__":
    sys.exit(main())
