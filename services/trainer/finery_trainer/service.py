"""The training service's parts, wired: store, database, clients, scheduler, server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finery_common.artifacts import ArtifactStore
from finery_common.catalogue import Catalogue
from finery_common.database import Database
from finery_common.errors import FailedPreconditionError
from finery_common.jobs import JobState, JobStore, migrate
from finery_common.rpc.channel import ServiceChannel
from finery_common.rpc.server import RpcServer, token_authenticator
from finery_common.rpc.tokens import TokenSigner
from finery_trainer.attempts import Attempts
from finery_trainer.client import DataprepClient, ServingClient
from finery_trainer.deployment import Deployments
from finery_trainer.devices import visible_gpus
from finery_trainer.launchers import Launcher, work_dir
from finery_trainer.launchers.local import LocalLauncher
from finery_trainer.requests import RequestChecks
from finery_trainer.resources import ResourceEstimates
from finery_trainer.runs import Runs
from finery_trainer.scheduler import Scheduler
from finery_trainer.server import TrainingServicer, WorkerServicer, servicers
from finery_trainer.settings import TrainerSettings
from finery_trainer.validation import Validation

WORKERS_STOP_S, DRAIN_S = 12.0, 6.0


@dataclass(frozen=True)
class Service:
    """A service that runs. `background` never ends by itself."""

    address: str
    jobs: JobStore
    background: tuple[asyncio.Task[None], ...]


@contextlib.asynccontextmanager
async def running(settings: TrainerSettings, *, make_launcher: Callable[[str], Launcher] | None = None) -> AsyncIterator[Service]:
    """Serves inside the block; at its end workers of this machine save their states and requests under way end.

    `make_launcher` gets the address that workers call. Raises FineryError where a part cannot start.
    """
    if settings.catalogue is None:
        raise FailedPreconditionError("FINERY_CATALOGUE is not set; set it to the YAML file of base models.")
    catalogue = Catalogue.load(settings.catalogue)
    signer = TokenSigner(settings.token_secret())
    artifacts = await asyncio.to_thread(ArtifactStore.connect, settings.s3())
    async with contextlib.AsyncExitStack() as stack:
        jobs = await _open_jobs(settings, stack)
        await _remove_leftovers(settings.state_dir, jobs)

        def channel(address: str) -> ServiceChannel:
            opened = ServiceChannel(address, signer=signer, caller="trainer")
            stack.push_async_callback(opened.close)
            return opened

        dataprep = DataprepClient(channel(settings.dataprep_address))
        serving = ServingClient(channel(settings.serving_address)) if settings.serving_address else None
        scheduler = Scheduler(
            jobs,
            validation=Validation(jobs, dataprep=dataprep, lease_s=settings.lease_s),
            signer=signer,
            settings=settings,
            holder=f"trainer@{socket.gethostname()}:{os.getpid()}",
        )
        cache_dir = settings.artifact_cache_dir
        gpus = partial(visible_gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
        count_gpus = (lambda: len(gpus())) if settings.launcher == "local" else (lambda: settings.kubernetes_max_gpus)
        checks = RequestChecks(catalogue=catalogue, cache_dir=cache_dir, artifacts=artifacts, serving=serving, count_gpus=count_gpus)
        runs = Runs(jobs, artifacts=artifacts, catalogue=catalogue, checks=checks, serving=serving, wake=scheduler.wake)
        attempts = Attempts(jobs, artifacts=artifacts, lease_s=settings.lease_s, serves=serving is not None, wake=scheduler.wake)
        estimates = ResourceEstimates(catalogue=catalogue, cache_dir=cache_dir, artifacts=artifacts, gpus=gpus)
        training = TrainingServicer(runs, estimates=estimates, catalogue=catalogue, cache_dir=cache_dir)
        server = RpcServer(
            address=settings.grpc_address,
            servicers=servicers(training, WorkerServicer(attempts)),
            authenticate=token_authenticator(signer),
        )
        port = await server.start()
        stack.push_async_callback(server.stop, drain_s=DRAIN_S)
        address = f"{settings.grpc_address.rpartition(':')[0]}:{port}"
        launcher = make_launcher(address) if make_launcher else await _launcher(settings, address=address)
        work = [scheduler.run(launcher)]
        if serving is not None:
            work.append(Deployments(jobs, serving=serving).run())
        background = tuple(asyncio.create_task(item) for item in work)
        stack.push_async_callback(_stop_work, background, scheduler, launcher)
        yield Service(address, jobs, background)


async def _launcher(settings: TrainerSettings, *, address: str) -> Launcher:
    if settings.launcher == "local":
        return LocalLauncher(trainer_address=address, state_dir=settings.state_dir)
    # Its client is large, and of use in a cluster only.
    from finery_trainer.launchers.kubernetes import KubernetesLauncher

    return await KubernetesLauncher.connect(settings)


async def _open_jobs(settings: TrainerSettings, stack: contextlib.AsyncExitStack) -> JobStore:
    db = await Database.open(settings.service_database_url("trainer"), schema="trainer")
    stack.push_async_callback(db.close)
    await migrate(db)
    return JobStore(db, kind="training", id_prefix="ftjob-")


async def _remove_leftovers(state_dir: Path, jobs: JobStore) -> None:
    """Removes the folders of attempts that are over; a worker that outlived the service before this one keeps its own."""
    running = {work_dir(state_dir, job_id=job.id, epoch=job.epoch) for job in await jobs.find(JobState.RUNNING)}
    for folder in (state_dir / "work").glob("*"):
        if folder not in running:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _stop_work(background: tuple[asyncio.Task[None], ...], scheduler: Scheduler, launcher: Launcher) -> None:
    """The server still answers meanwhile: workers report the states that they save."""
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    await launcher.stop_all(grace_s=WORKERS_STOP_S)
    await scheduler.take_exits(launcher)
