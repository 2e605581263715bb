"""What a request handler works with: the gateway's parts, and the project that the request's key opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from finery_common.artifacts import ArtifactStore
from finery_common.database import Database
from finery_common.errors import UnauthenticatedError
from finery_gateway.admission import Allowance
from finery_gateway.client import ConversionClient, DatasetClient, ServingClient, TrainingClient
from finery_gateway.creates import Attempt, Creates
from finery_gateway.files import Files
from finery_gateway.keys import KeyStore
from finery_gateway.limit_table import LimitTable
from finery_gateway.proxy import Proxy
from finery_gateway.resources import FINAL_STATES


@dataclass(frozen=True)
class Gateway:
    """The parts, wired in `__main__`."""

    db: Database
    store: ArtifactStore
    keys: KeyStore
    limits: LimitTable
    creates: Creates
    files: Files
    training: TrainingClient
    datasets: DatasetClient
    conversions: ConversionClient
    serving: ServingClient
    proxy: Proxy

    async def file_users(self, project: str, file_id: str) -> tuple[str, ...]:
        """Ids of the jobs and datasets that still need a file."""
        jobs = [
            job.id async for job in self.training.all_jobs(project) if _needs(job.state, file_id, job.training_file, job.validation_file)
        ]
        datasets = [item.id async for item in self.datasets.all(project) if _needs(item.state, file_id, item.spec.file)]
        return (*jobs, *datasets)


def _needs(state: str, file_id: str, *used: str | None) -> bool:
    return state not in FINAL_STATES and file_id in used


# Asynchronous without need: FastAPI would run a plain function in a thread.
async def gateway_of(request: Request) -> Gateway:
    """The parts behind the app."""
    return request.app.state.gateway


async def project_of(request: Request, gateway: Annotated[Gateway, Depends(gateway_of)]) -> str:
    """The caller's project, for a request that is now one of its key's.

    Raises UnauthenticatedError without a good key, RateLimitedError where its key has had its requests of the minute.
    """
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise UnauthenticatedError("No API key; send the header `Authorization: Bearer sk-finery-…`.")
    grant = await gateway.keys.grant_of(key.strip())
    allowance = Allowance(gateway.limits, key_id=grant.key_id, limits=grant.limits)
    request.state.project, request.state.key_id, request.state.allowance = grant.project, grant.key_id, allowance
    allowance.take_request()
    return grant.project


async def attempt_of(request: Request) -> Attempt:
    """How a create arrived."""
    return Attempt.of(request)


GatewayParts = Annotated[Gateway, Depends(gateway_of)]
Project = Annotated[str, Depends(project_of)]
CreateAttempt = Annotated[Attempt, Depends(attempt_of)]
