"""The inner services as the gateway calls them: typed resources in and out, FineryError on failure. Owns this side's use of the stubs.

A service that cannot be reached is UnavailableError in plain words, without addresses.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import grpc.aio
from google.protobuf.message import Message

from finery.common.v1 import job_pb2
from finery.conversion.v1 import conversion_pb2, conversion_pb2_grpc
from finery.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery.training.v1 import spec_pb2, training_pb2, training_pb2_grpc
from finery_common.conversion_spec import ConversionSpec
from finery_common.errors import FineryError, UnavailableError
from finery_common.rpc.channel import ServiceChannel, stream
from finery_common.spec import DatasetSpec, TrainingSpec
from finery_gateway.resources import (
    Alias,
    AliasEvent,
    Artifact,
    BaseModelEntry,
    Checkpoint,
    Conversion,
    Dataset,
    Job,
    JobEvent,
    Page,
    Resource,
    ResourceEstimate,
    Route,
    ServedBase,
)

MAX_PAGE_SIZE = 1000


class UnreachableServiceError(UnavailableError):
    """No answer of the service came; what was asked may have been begun."""


R = TypeVar("R", bound=Resource)
M = TypeVar("M", bound=Message)
S = TypeVar("S")


@dataclass(frozen=True)
class NewJob:
    """What a caller decides of a job."""

    training_file: str
    validation_file: str | None
    spec: TrainingSpec
    suffix: str
    metadata: Mapping[str, str]
    deploy: bool | None


class _Client:
    """What the clients share: credentials, and the words for a service that is not there."""

    def __init__(self, channel: ServiceChannel, *, service: str) -> None:
        self._channel = channel
        self._service = service

    async def _call(self, method: Callable[..., Awaitable[M]], request: Message, *, project: str, timeout_s: float | None = None) -> M:
        try:
            return await method(request, metadata=self._channel.metadata(project=project), timeout=timeout_s)
        except UnavailableError as error:
            raise self._unreachable(error) from error

    async def _watch(self, method: Callable[..., AsyncIterable[M]], request: Message, *, project: str, kind: type[R]) -> AsyncIterator[R]:
        try:
            async for message in stream(method(request, metadata=self._channel.metadata(project=project))):
                yield kind.from_proto(message)
        except UnavailableError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: UnavailableError) -> FineryError:
        if isinstance(error.__cause__, grpc.aio.AioRpcError) and rich_status(error.__cause__) is not None:
            return error  # The service's own words.
        return UnreachableServiceError(
            f"The {self._service} service cannot be reached at the moment; try again in a few seconds.", retry_after_s=2
        )


class TrainingClient(_Client):
    """Fine-tuning jobs and the catalogue."""

    def __init__(self, channel: ServiceChannel) -> None:
        super().__init__(channel, service="training")
        self._stub = training_pb2_grpc.TrainingServiceStub(channel.grpc)

    async def create_job(self, project: str, *, job: NewJob, request_id: str) -> Job:
        message = training_pb2.Job(
            training_file=job.training_file,
            validation_file=job.validation_file,
            spec=job.spec.to_proto(spec_pb2.TrainingSpec),
            suffix=job.suffix,
            metadata=job.metadata,
            deploy=job.deploy,
        )
        request = training_pb2.CreateJobRequest(parent=f"projects/{project}", job=message, request_id=request_id)
        return Job.from_proto(await self._call(self._stub.CreateJob, request, project=project))

    async def get_job(self, project: str, *, job_id: str) -> Job:
        request = training_pb2.GetJobRequest(name=_name(project, "jobs", job_id))
        return Job.from_proto(await self._call(self._stub.GetJob, request, project=project))

    async def list_jobs(
        self, project: str, *, page_size: int, page_token: str = "", metadata: Mapping[str, str] | None = None
    ) -> Page[Job]:
        """Newest first. A page token is the id of the job before the page."""
        request = training_pb2.ListJobsRequest(
            parent=f"projects/{project}", page_size=page_size, page_token=page_token, metadata=metadata or {}
        )
        answer = await self._call(self._stub.ListJobs, request, project=project)
        return Page(data=tuple(Job.from_proto(item) for item in answer.jobs), next_page_token=answer.next_page_token)

    async def all_jobs(self, project: str) -> AsyncIterator[Job]:
        """Every job of the project, newest first."""
        token = ""
        while True:
            page = await self.list_jobs(project, page_size=MAX_PAGE_SIZE, page_token=token)
            for job in page.data:
                yield job
            token = page.next_page_token
            if not token:
                return

    async def cancel_job(self, project: str, *, job_id: str) -> Job:
        request = training_pb2.CancelJobRequest(name=_name(project, "jobs", job_id))
        return Job.from_proto(await self._call(self._stub.CancelJob, request, project=project))

    async def pause_job(self, project: str, *, job_id: str) -> Job:
        request = training_pb2.PauseJobRequest(name=_name(project, "jobs", job_id))
        return Job.from_proto(await self._call(self._stub.PauseJob, request, project=project))

    async def resume_job(self, project: str, *, job_id: str) -> Job:
        request = training_pb2.ResumeJobRequest(name=_name(project, "jobs", job_id))
        return Job.from_proto(await self._call(self._stub.ResumeJob, request, project=project))

    async def delete_job(self, project: str, *, job_id: str) -> None:
        request = training_pb2.DeleteJobRequest(name=_name(project, "jobs", job_id))
        await self._call(self._stub.DeleteJob, request, project=project)

    def watch_job(self, project: str, *, job_id: str, after_sequence: int) -> AsyncIterator[JobEvent]:
        request = training_pb2.WatchJobRequest(name=_name(project, "jobs", job_id), after_sequence=after_sequence)
        return self._watch(self._stub.WatchJob, request, project=project, kind=JobEvent)

    async def list_events(self, project: str, *, job_id: str, page_size: int, page_token: str) -> Page[JobEvent]:
        """Newest first. A page token is the sequence of the event before the page."""
        request = training_pb2.ListEventsRequest(
            parent=_name(project, "jobs", job_id), page_size=page_size, page_token=page_token, descending=True
        )
        answer = await self._call(self._stub.ListEvents, request, project=project)
        return Page(data=tuple(JobEvent.from_proto(item) for item in answer.events), next_page_token=answer.next_page_token)

    async def list_checkpoints(self, project: str, *, job_id: str, page_size: int, page_token: str = "") -> Page[Checkpoint]:
        """Newest first. A page token is the step of the checkpoint before the page."""
        request = training_pb2.ListCheckpointsRequest(parent=_name(project, "jobs", job_id), page_size=page_size, page_token=page_token)
        answer = await self._call(self._stub.ListCheckpoints, request, project=project)
        return Page(data=tuple(Checkpoint.from_proto(item) for item in answer.checkpoints), next_page_token=answer.next_page_token)

    async def list_base_models(self, project: str) -> tuple[BaseModelEntry, ...]:
        answer = await self._call(self._stub.ListBaseModels, training_pb2.ListBaseModelsRequest(), project=project)
        return tuple(BaseModelEntry.from_proto(item) for item in answer.base_models)

    async def estimate_resources(self, project: str, *, spec: TrainingSpec, device_memory_bytes: int | None) -> ResourceEstimate:
        request = training_pb2.EstimateResourcesRequest(
            parent=f"projects/{project}", spec=spec.to_proto(spec_pb2.TrainingSpec), device_memory_bytes=device_memory_bytes
        )
        return ResourceEstimate.from_proto(await self._call(self._stub.EstimateResources, request, project=project))


class DatasetClient(_Client):
    """Prepared datasets."""

    def __init__(self, channel: ServiceChannel) -> None:
        super().__init__(channel, service="dataset")
        self._stub = dataset_pb2_grpc.DatasetServiceStub(channel.grpc)

    async def create(self, project: str, *, spec: DatasetSpec, request_id: str) -> Dataset:
        request = dataset_pb2.CreateDatasetRequest(
            parent=f"projects/{project}", spec=spec.to_proto(dataset_pb2.DatasetSpec), request_id=request_id
        )
        return Dataset.from_proto(await self._call(self._stub.CreateDataset, request, project=project))

    async def get(self, project: str, *, dataset_id: str) -> Dataset:
        request = dataset_pb2.GetDatasetRequest(name=_name(project, "datasets", dataset_id))
        return Dataset.from_proto(await self._call(self._stub.GetDataset, request, project=project))

    async def list(self, project: str, *, page_size: int, page_token: str = "") -> Page[Dataset]:
        request = dataset_pb2.ListDatasetsRequest(parent=f"projects/{project}", page_size=page_size, page_token=page_token)
        answer = await self._call(self._stub.ListDatasets, request, project=project)
        return Page(data=tuple(Dataset.from_proto(item) for item in answer.datasets), next_page_token=answer.next_page_token)

    async def all(self, project: str) -> AsyncIterator[Dataset]:
        """Every dataset of the project."""
        token = ""
        while True:
            page = await self.list(project, page_size=MAX_PAGE_SIZE, page_token=token)
            for dataset in page.data:
                yield dataset
            token = page.next_page_token
            if not token:
                return

    async def cancel(self, project: str, *, dataset_id: str) -> Dataset:
        request = dataset_pb2.CancelDatasetRequest(name=_name(project, "datasets", dataset_id))
        return Dataset.from_proto(await self._call(self._stub.CancelDataset, request, project=project))

    async def delete(self, project: str, *, dataset_id: str) -> None:
        request = dataset_pb2.DeleteDatasetRequest(name=_name(project, "datasets", dataset_id))
        await self._call(self._stub.DeleteDataset, request, project=project)

    def watch(self, project: str, *, dataset_id: str, after_sequence: int) -> AsyncIterator[JobEvent]:
        request = dataset_pb2.WatchDatasetRequest(name=_name(project, "datasets", dataset_id), after_sequence=after_sequence)
        return self._watch(self._stub.WatchDataset, request, project=project, kind=JobEvent)


class ConversionClient(_Client):
    """Conversions of adapters."""

    def __init__(self, channel: ServiceChannel) -> None:
        super().__init__(channel, service="conversion")
        self._stub = conversion_pb2_grpc.ConversionServiceStub(channel.grpc)

    async def create(self, project: str, *, spec: ConversionSpec, request_id: str) -> Conversion:
        request = conversion_pb2.CreateConversionRequest(
            parent=f"projects/{project}", spec=spec.to_proto(conversion_pb2.ConversionSpec), request_id=request_id
        )
        return Conversion.from_proto(await self._call(self._stub.CreateConversion, request, project=project))

    async def get(self, project: str, *, conversion_id: str) -> Conversion:
        request = conversion_pb2.GetConversionRequest(name=_name(project, "conversions", conversion_id))
        return Conversion.from_proto(await self._call(self._stub.GetConversion, request, project=project))

    async def list(self, project: str, *, page_size: int, page_token: str = "") -> Page[Conversion]:
        request = conversion_pb2.ListConversionsRequest(parent=f"projects/{project}", page_size=page_size, page_token=page_token)
        answer = await self._call(self._stub.ListConversions, request, project=project)
        return Page(data=tuple(Conversion.from_proto(item) for item in answer.conversions), next_page_token=answer.next_page_token)

    async def cancel(self, project: str, *, conversion_id: str) -> Conversion:
        request = conversion_pb2.CancelConversionRequest(name=_name(project, "conversions", conversion_id))
        return Conversion.from_proto(await self._call(self._stub.CancelConversion, request, project=project))

    async def delete(self, project: str, *, conversion_id: str) -> None:
        request = conversion_pb2.DeleteConversionRequest(name=_name(project, "conversions", conversion_id))
        await self._call(self._stub.DeleteConversion, request, project=project)

    def watch(self, project: str, *, conversion_id: str, after_sequence: int) -> AsyncIterator[JobEvent]:
        request = conversion_pb2.WatchConversionRequest(name=_name(project, "conversions", conversion_id), after_sequence=after_sequence)
        return self._watch(self._stub.WatchConversion, request, project=project, kind=JobEvent)


class ServingClient(_Client):
    """Deployments, aliases and routes."""

    def __init__(self, channel: ServiceChannel) -> None:
        super().__init__(channel, service="serving")
        self._stub = serving_pb2_grpc.ServingServiceStub(channel.grpc)

    async def list_served_bases(self, project: str) -> tuple[ServedBase, ...]:
        answer = await self._call(self._stub.ListDeployments, serving_pb2.ListDeploymentsRequest(), project=project)
        return tuple(ServedBase.from_proto(item) for item in answer.deployments)

    async def deploy(
        self, project: str, *, alias: str, adapter: Artifact, etag: str, request_id: str, canary_weight: int | None = None
    ) -> Alias:
        """Answers at once; the alias' rollout tells how far it is."""
        ref = job_pb2.ArtifactRef(**adapter.model_dump())
        request = serving_pb2.DeployAdapterRequest(
            parent=f"projects/{project}", alias=alias, adapter=ref, etag=etag, request_id=request_id, canary_weight=canary_weight
        )
        return Alias.from_proto(await self._call(self._stub.DeployAdapter, request, project=project))

    async def get_alias(self, project: str, *, alias: str) -> Alias:
        request = serving_pb2.GetAliasRequest(name=_name(project, "aliases", alias))
        return Alias.from_proto(await self._call(self._stub.GetAlias, request, project=project))

    async def list_aliases(self, project: str, *, page_size: int, page_token: str = "") -> Page[Alias]:
        request = serving_pb2.ListAliasesRequest(parent=f"projects/{project}", page_size=page_size, page_token=page_token)
        answer = await self._call(self._stub.ListAliases, request, project=project)
        return Page(data=tuple(Alias.from_proto(item) for item in answer.aliases), next_page_token=answer.next_page_token)

    async def all_aliases(self, project: str) -> AsyncIterator[Alias]:
        """Every alias of the project."""
        token = ""
        while True:
            page = await self.list_aliases(project, page_size=MAX_PAGE_SIZE, page_token=token)
            for alias in page.data:
                yield alias
            token = page.next_page_token
            if not token:
                return

    async def delete_alias(self, project: str, *, alias: str, etag: str = "") -> None:
        request = serving_pb2.DeleteAliasRequest(name=_name(project, "aliases", alias), etag=etag)
        await self._call(self._stub.DeleteAlias, request, project=project)

    async def set_canary_weight(self, project: str, *, alias: str, weight: int, etag: str) -> Alias:
        request = serving_pb2.SetCanaryWeightRequest(name=_name(project, "aliases", alias), weight=weight, etag=etag)
        return Alias.from_proto(await self._call(self._stub.SetCanaryWeight, request, project=project))

    async def promote(self, project: str, *, alias: str, etag: str, request_id: str) -> Alias:
        """The canary serves the whole alias at once; the rollout tells when the old version is gone."""
        request = serving_pb2.PromoteAliasRequest(name=_name(project, "aliases", alias), etag=etag, request_id=request_id)
        return Alias.from_proto(await self._call(self._stub.PromoteAlias, request, project=project))

    async def roll_back(self, project: str, *, alias: str, etag: str, request_id: str) -> Alias:
        """The canary is gone at once; without one, the rollout tells how far the version before is."""
        request = serving_pb2.RollBackAliasRequest(name=_name(project, "aliases", alias), etag=etag, request_id=request_id)
        return Alias.from_proto(await self._call(self._stub.RollBackAlias, request, project=project))

    async def pin(self, project: str, *, alias: str) -> Alias:
        request = serving_pb2.PinAliasRequest(name=_name(project, "aliases", alias))
        return Alias.from_proto(await self._call(self._stub.PinAlias, request, project=project))

    async def unpin(self, project: str, *, alias: str) -> Alias:
        request = serving_pb2.UnpinAliasRequest(name=_name(project, "aliases", alias))
        return Alias.from_proto(await self._call(self._stub.UnpinAlias, request, project=project))

    def watch_aliases(self, project: str) -> AsyncIterator[AliasEvent]:
        request = serving_pb2.WatchAliasesRequest(parent=f"projects/{project}")
        return self._watch(self._stub.WatchAliases, request, project=project, kind=AliasEvent)

    async def resolve(self, project: str, *, model: str, after_epoch: int, timeout_s: float) -> Route:
        """Waits up to `timeout_s` for a rollout under way; raises DeadlineExceededError after that."""
        request = serving_pb2.ResolveModelRequest(parent=f"projects/{project}", model=model, after_epoch=after_epoch)
        return Route.from_proto(await self._call(self._stub.ResolveModel, request, project=project, timeout_s=timeout_s))


def rich_status(error: grpc.aio.AioRpcError) -> bytes | None:
    """The serialized google.rpc.Status that our services send with every error; none where the call never reached one."""
    trailing = cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())
    return next((value for key, value in trailing if key == "grpc-status-details-bin"), None)


def _name(project: str, collection: str, resource_id: str) -> str:
    return f"projects/{project}/{collection}/{resource_id}"
