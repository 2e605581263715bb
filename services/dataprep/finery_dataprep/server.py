"""DatasetService on the wire: translates, calls the job store, translates back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc.aio
from google.protobuf.empty_pb2 import Empty

from finery.common.v1 import job_pb2
from finery.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from finery_common.artifacts import ArtifactRef, ArtifactStore
from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_common.jobs import Job, JobStore, Wanted
from finery_common.resource_names import ResourceName, parse_name, parse_parent
from finery_common.rpc.messages import artifact_to_proto, error_to_proto, event_to_proto, state_to_proto, timestamp
from finery_common.rpc.server import Servicer
from finery_common.rpc.tokens import require_project
from finery_common.spec import DatasetSpec
from finery_dataprep.runner import DatasetRunner, dataset_prefix

SERVICE = "finery.dataset.v1.DatasetService"
COLLECTION = "datasets"
DEFAULT_PAGE_SIZE = 50


class DatasetServicer(dataset_pb2_grpc.DatasetServiceServicer):
    """The datasets of whichever project the caller's credentials name. `context_limit` answers how many
    tokens a base model takes, and raises NotFoundError for one that nobody knows."""

    def __init__(self, jobs: JobStore, *, artifacts: ArtifactStore, runner: DatasetRunner, context_limit: Callable[[str], int]) -> None:
        self._jobs = jobs
        self._artifacts = artifacts
        self._runner = runner
        self._context_limit = context_limit

    async def CreateDataset(
        self, request: dataset_pb2.CreateDatasetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> dataset_pb2.Dataset:
        project = parse_parent(request.parent, project=require_project())
        spec = DatasetSpec.from_proto(request.spec)
        _check_length(spec, self._context_limit(spec.base_model))
        job = await self._jobs.create(project, request_id=request.request_id, spec=spec.model_dump(mode="json"))
        self._runner.wake()
        return dataset_to_proto(job)

    async def GetDataset(self, request: dataset_pb2.GetDatasetRequest, context: grpc.aio.ServicerContext[Any, Any]) -> dataset_pb2.Dataset:
        return dataset_to_proto(await self._job(request.name))

    async def ListDatasets(
        self, request: dataset_pb2.ListDatasetsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> dataset_pb2.ListDatasetsResponse:
        project = parse_parent(request.parent, project=require_project())
        page = await self._jobs.list(project, page_size=request.page_size or DEFAULT_PAGE_SIZE, page_token=request.page_token)
        return dataset_pb2.ListDatasetsResponse(datasets=[dataset_to_proto(job) for job in page.jobs], next_page_token=page.next_page_token)

    async def CancelDataset(
        self, request: dataset_pb2.CancelDatasetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> dataset_pb2.Dataset:
        job = await self._job(request.name)
        job = await self._jobs.request(job.id, Wanted.CANCEL)
        self._runner.wake()
        return dataset_to_proto(job)

    async def DeleteDataset(self, request: dataset_pb2.DeleteDatasetRequest, context: grpc.aio.ServicerContext[Any, Any]) -> Empty:
        job = await self._job(request.name)
        if not job.state.is_final:
            raise FailedPreconditionError(f"{request.name} is {job.state}; cancel it and wait until it is CANCELLED before deleting it.")
        await asyncio.to_thread(self._artifacts.delete, dataset_prefix(job.project, job.id))
        await self._jobs.delete(job.id)
        return Empty()

    async def WatchDataset(
        self, request: dataset_pb2.WatchDatasetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[job_pb2.JobEvent]:
        job = await self._job(request.name)
        async with contextlib.aclosing(self._jobs.watch(job.id, after_sequence=request.after_sequence)) as events:
            async for event in events:
                yield event_to_proto(event)

    async def _job(self, name: str) -> Job:
        parsed = parse_name(name, collection=COLLECTION, project=require_project())
        return await self._jobs.get(parsed.project, parsed.id)


def _check_length(spec: DatasetSpec, limit: int) -> None:
    if spec.max_sequence_length > limit:
        raise InvalidArgumentError(
            f"max_sequence_length: got {spec.max_sequence_length}, wanted at most {limit}, the most that {spec.base_model} takes",
            param="max_sequence_length",
        )


def servicer_of(servicer: DatasetServicer) -> Servicer:
    """The servicer as RpcServer takes it."""
    return Servicer(SERVICE, partial(dataset_pb2_grpc.add_DatasetServiceServicer_to_server, servicer))


def dataset_to_proto(job: Job) -> dataset_pb2.Dataset:
    """A job of kind dataset as the wire has it."""
    statistics, artifact = job.result.get("statistics"), job.result.get("artifact")
    return dataset_pb2.Dataset(
        name=str(ResourceName(job.project, COLLECTION, job.id)),
        spec=DatasetSpec.parse(job.spec).to_proto(dataset_pb2.DatasetSpec),
        state=state_to_proto(job.state),
        error=error_to_proto(job.error),
        statistics=dataset_pb2.DatasetStatistics(**statistics) if isinstance(statistics, dict) else None,
        artifact=artifact_to_proto(ArtifactRef.model_validate(artifact)) if artifact else None,
        create_time=timestamp(job.created_at),
        finish_time=timestamp(job.finished_at),
    )
