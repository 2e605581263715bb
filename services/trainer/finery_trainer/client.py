"""The services that training calls, and for a worker the training service itself: plain calls in, typed answers out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from finery.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery.training.v1 import training_pb2, worker_pb2, worker_pb2_grpc
from finery_common.artifacts import ArtifactRef
from finery_common.jobs import JobState
from finery_common.resource_names import ResourceName
from finery_common.rpc.channel import ServiceChannel, bearer, worker_channel
from finery_common.rpc.messages import (
    artifact_from_proto,
    artifact_to_proto,
    error_from_proto,
    error_to_proto,
    state_from_proto,
    state_to_proto,
)
from finery_common.spec import DatasetSpec, TrainingSpec
from finery_trainer.records import CheckpointReport, StepMetrics

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class DatasetStatus:
    """A dataset as dataprep has it."""

    id: str
    state: JobState
    error: dict[str, object] | None
    artifact: ArtifactRef | None


class DataprepClient:
    """Datasets, on behalf of a project."""

    def __init__(self, channel: ServiceChannel) -> None:
        self._channel = channel
        self._stub = dataset_pb2_grpc.DatasetServiceStub(channel.grpc)

    async def create(self, project: str, *, spec: DatasetSpec, request_id: str) -> DatasetStatus:
        """The dataset of that request id, made or found."""
        request = dataset_pb2.CreateDatasetRequest(
            parent=f"projects/{project}", spec=spec.to_proto(dataset_pb2.DatasetSpec), request_id=request_id
        )
        return _dataset(await self._stub.CreateDataset(request, metadata=self._channel.metadata(project=project), timeout=_TIMEOUT_S))

    async def get(self, project: str, *, dataset_id: str) -> DatasetStatus:
        request = dataset_pb2.GetDatasetRequest(name=str(ResourceName(project, "datasets", dataset_id)))
        return _dataset(await self._stub.GetDataset(request, metadata=self._channel.metadata(project=project), timeout=_TIMEOUT_S))

    async def cancel(self, project: str, *, dataset_id: str) -> None:
        request = dataset_pb2.CancelDatasetRequest(name=str(ResourceName(project, "datasets", dataset_id)))
        await self._stub.CancelDataset(request, metadata=self._channel.metadata(project=project), timeout=_TIMEOUT_S)


@dataclass(frozen=True)
class AliasStatus:
    """An alias as serving has it. `error` is set where its rollout failed."""

    alias: str
    job_id: str
    adapter: ArtifactRef | None
    canary_adapter: ArtifactRef | None
    is_serving: bool
    error: str | None


@dataclass(frozen=True)
class ServedBase:
    """A base model that serving runs."""

    name: str
    max_lora_rank: int


class ServingClient:
    """Aliases, on behalf of a project."""

    def __init__(self, channel: ServiceChannel) -> None:
        self._channel = channel
        self._stub = serving_pb2_grpc.ServingServiceStub(channel.grpc)

    async def served_bases(self, project: str) -> dict[str, ServedBase]:
        """The base models being served, by name."""
        metadata = self._channel.metadata(project=project)
        answer = await self._stub.ListDeployments(serving_pb2.ListDeploymentsRequest(), metadata=metadata, timeout=_TIMEOUT_S)
        return {item.base_model: ServedBase(item.base_model, item.max_lora_rank) for item in answer.deployments}

    async def deploy(self, project: str, *, alias: str, adapter: ArtifactRef, request_id: str) -> AliasStatus:
        """Starts the rollout of that request id, or finds it."""
        request = serving_pb2.DeployAdapterRequest(
            parent=f"projects/{project}", alias=alias, adapter=artifact_to_proto(adapter), request_id=request_id
        )
        return _alias(await self._stub.DeployAdapter(request, metadata=self._channel.metadata(project=project), timeout=_TIMEOUT_S))

    async def get(self, project: str, *, alias: str) -> AliasStatus:
        request = serving_pb2.GetAliasRequest(name=str(ResourceName(project, "aliases", alias)))
        return _alias(await self._stub.GetAlias(request, metadata=self._channel.metadata(project=project), timeout=_TIMEOUT_S))

    async def aliases(self, project: str) -> list[AliasStatus]:
        """Every alias of the project."""
        found: list[AliasStatus] = []
        token = ""
        while True:
            request = serving_pb2.ListAliasesRequest(parent=f"projects/{project}", page_size=1000, page_token=token)
            answer = await self._stub.ListAliases(request, metadata=self._channel.metadata(project=project), timeout=_TIMEOUT_S)
            found.extend(_alias(item) for item in answer.aliases)
            token = answer.next_page_token
            if not token:
                return found


class Command(StrEnum):
    """What the server wants of a worker."""

    CONTINUE = "CONTINUE"
    PAUSE = "PAUSE"
    CANCEL = "CANCEL"


@dataclass(frozen=True)
class Assignment:
    """What one attempt is to do."""

    project: str
    job_id: str
    epoch: int
    spec: TrainingSpec
    training_dataset: ArtifactRef
    validation_dataset: ArtifactRef | None
    checkpoint: ArtifactRef | None
    traceparent: str = ""


class WorkerClient:
    """The training service as a worker's token sees it. Make it inside a running event loop."""

    def __init__(self, address: str, *, token: str) -> None:
        self._channel = worker_channel(address)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self._metadata = bearer(token)

    async def assignment(self) -> Assignment:
        answer = await self._stub.GetAssignment(worker_pb2.GetAssignmentRequest(), metadata=self._metadata, timeout=_TIMEOUT_S)
        return Assignment(
            project=answer.project,
            job_id=answer.job_id,
            epoch=answer.epoch,
            spec=TrainingSpec.from_proto(answer.spec),
            training_dataset=artifact_from_proto(answer.training_dataset),
            validation_dataset=artifact_from_proto(answer.validation_dataset) if answer.HasField("validation_dataset") else None,
            checkpoint=artifact_from_proto(answer.checkpoint) if answer.HasField("checkpoint") else None,
            traceparent=answer.traceparent,
        )

    async def heartbeat(self, phase: str) -> Command:
        answer = await self._stub.Heartbeat(worker_pb2.HeartbeatRequest(phase=phase), metadata=self._metadata, timeout=_TIMEOUT_S)
        return _command(answer)

    async def report_step(self, metrics: StepMetrics) -> Command:
        request = worker_pb2.ReportStepRequest(metrics=training_pb2.StepMetrics(**metrics.to_fields()))
        return _command(await self._stub.ReportStep(request, metadata=self._metadata, timeout=_TIMEOUT_S))

    async def report_checkpoint(self, report: CheckpointReport) -> Command:
        request = worker_pb2.ReportCheckpointRequest(
            step=report.step,
            state=None if report.state is None else artifact_to_proto(report.state),
            adapter=None if report.adapter is None else artifact_to_proto(report.adapter),
            metrics=training_pb2.StepMetrics(**report.metrics.to_fields()),
        )
        return _command(await self._stub.ReportCheckpoint(request, metadata=self._metadata, timeout=_TIMEOUT_S))

    async def finish(
        self,
        state: JobState,
        *,
        error: dict[str, object] | None = None,
        adapter: ArtifactRef | None = None,
        model: ArtifactRef | None = None,
        metrics_file: ArtifactRef | None = None,
    ) -> None:
        request = worker_pb2.FinishAttemptRequest(
            state=state_to_proto(state),
            error=error_to_proto(error),
            adapter=None if adapter is None else artifact_to_proto(adapter),
            model=None if model is None else artifact_to_proto(model),
            metrics_file=None if metrics_file is None else artifact_to_proto(metrics_file),
        )
        await self._stub.FinishAttempt(request, metadata=self._metadata, timeout=_TIMEOUT_S)

    async def close(self) -> None:
        await self._channel.close(None)


def _dataset(message: dataset_pb2.Dataset) -> DatasetStatus:
    return DatasetStatus(
        id=message.name.rpartition("/")[2],
        state=state_from_proto(message.state),
        error=error_from_proto(message.error) if message.HasField("error") else None,
        artifact=artifact_from_proto(message.artifact) if message.HasField("artifact") else None,
    )


def _alias(message: serving_pb2.Alias) -> AliasStatus:
    has_failed = message.rollout.state == serving_pb2.ROLLOUT_STATE_FAILED
    return AliasStatus(
        alias=message.alias,
        job_id=message.job_id,
        adapter=artifact_from_proto(message.adapter) if message.HasField("adapter") else None,
        canary_adapter=artifact_from_proto(message.canary.adapter) if message.HasField("canary") else None,
        is_serving=bool(message.version),
        error=(message.rollout.error.message or "the rollout failed") if has_failed else None,
    )


def _command(message: worker_pb2.WorkerCommand) -> Command:
    name = worker_pb2.WorkerAction.Name(message.action).removeprefix("WORKER_ACTION_")
    return Command.CONTINUE if name == "UNSPECIFIED" else Command(name)
