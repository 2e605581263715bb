"""TrainingService and WorkerService on the wire: translate, call, translate back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf.empty_pb2 import Empty

from finery.common.v1 import job_pb2, model_pb2
from finery.training.v1 import spec_pb2, training_pb2, training_pb2_grpc, worker_pb2, worker_pb2_grpc
from finery_common.catalogue import BaseModelEntry, Catalogue, remembered_sha256
from finery_common.jobs import Job, Lease
from finery_common.resource_names import parse_name, parse_parent
from finery_common.rpc.messages import (
    artifact_from_proto,
    artifact_to_proto,
    error_from_proto,
    error_to_proto,
    event_to_proto,
    state_from_proto,
    state_to_proto,
    timestamp,
)
from finery_common.rpc.server import Servicer
from finery_common.rpc.tokens import require_attempt, require_project
from finery_common.spec import TrainingSpec
from finery_trainer.attempts import Attempts
from finery_trainer.client import Command
from finery_trainer.records import (
    CheckpointReport,
    JobRequest,
    StepMetrics,
    artifact_of,
    deployment_of,
    estimated_finish_of,
    metrics_of,
    request_of,
    text_of,
)
from finery_trainer.resources import ResourceEstimate, ResourceEstimates
from finery_trainer.runs import Checkpoint, Runs

Context = grpc.aio.ServicerContext[Any, Any]


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """The jobs of whichever project the caller's credentials name."""

    def __init__(self, runs: Runs, *, estimates: ResourceEstimates, catalogue: Catalogue, cache_dir: Path) -> None:
        self._runs = runs
        self._estimates = estimates
        self._catalogue = catalogue
        self._cache_dir = cache_dir

    async def CreateJob(self, request: training_pb2.CreateJobRequest, context: Context) -> training_pb2.Job:
        project = parse_parent(request.parent, project=require_project())
        wanted = JobRequest(
            training_file=request.job.training_file,
            validation_file=request.job.validation_file if request.job.HasField("validation_file") else None,
            spec=TrainingSpec.from_proto(request.job.spec),
            suffix=request.job.suffix,
            deploy=request.job.deploy if request.job.HasField("deploy") else None,
        )
        return job_to_proto(
            await self._runs.create(project, request=wanted, metadata=dict(request.job.metadata), request_id=request.request_id)
        )

    async def GetJob(self, request: training_pb2.GetJobRequest, context: Context) -> training_pb2.Job:
        return job_to_proto(await self._runs.get(*_named(request.name)))

    async def ListJobs(self, request: training_pb2.ListJobsRequest, context: Context) -> training_pb2.ListJobsResponse:
        project = parse_parent(request.parent, project=require_project())
        page = await self._runs.list(project, page_size=request.page_size, page_token=request.page_token, metadata=dict(request.metadata))
        return training_pb2.ListJobsResponse(jobs=map(job_to_proto, page.jobs), next_page_token=page.next_page_token)

    async def CancelJob(self, request: training_pb2.CancelJobRequest, context: Context) -> training_pb2.Job:
        return job_to_proto(await self._runs.cancel(*_named(request.name)))

    async def PauseJob(self, request: training_pb2.PauseJobRequest, context: Context) -> training_pb2.Job:
        return job_to_proto(await self._runs.pause(*_named(request.name)))

    async def ResumeJob(self, request: training_pb2.ResumeJobRequest, context: Context) -> training_pb2.Job:
        return job_to_proto(await self._runs.resume(*_named(request.name)))

    async def DeleteJob(self, request: training_pb2.DeleteJobRequest, context: Context) -> Empty:
        await self._runs.delete(*_named(request.name))
        return Empty()

    async def WatchJob(self, request: training_pb2.WatchJobRequest, context: Context) -> AsyncIterator[job_pb2.JobEvent]:
        async for event in self._runs.watch(*_named(request.name), after_sequence=request.after_sequence):
            yield event_to_proto(event)

    async def ListEvents(self, request: training_pb2.ListEventsRequest, context: Context) -> training_pb2.ListEventsResponse:
        events, token = await self._runs.events(
            *_named(request.parent), page_size=request.page_size, page_token=request.page_token, descending=request.descending
        )
        return training_pb2.ListEventsResponse(events=map(event_to_proto, events), next_page_token=token)

    async def ListCheckpoints(self, request: training_pb2.ListCheckpointsRequest, context: Context) -> training_pb2.ListCheckpointsResponse:
        found, token = await self._runs.checkpoints(*_named(request.parent), page_size=request.page_size, page_token=request.page_token)
        return training_pb2.ListCheckpointsResponse(
            checkpoints=[_checkpoint_to_proto(item, job_name=request.parent) for item in found], next_page_token=token
        )

    async def ListBaseModels(self, request: training_pb2.ListBaseModelsRequest, context: Context) -> training_pb2.ListBaseModelsResponse:
        require_project()
        models = [await asyncio.to_thread(self._base_model, entry) for entry in self._catalogue.list()]
        return training_pb2.ListBaseModelsResponse(base_models=models)

    async def EstimateResources(
        self, request: training_pb2.EstimateResourcesRequest, context: Context
    ) -> training_pb2.EstimateResourcesResponse:
        parse_parent(request.parent, project=require_project())
        asked_bytes = request.device_memory_bytes if request.HasField("device_memory_bytes") else None
        found = await self._estimates.estimate(TrainingSpec.from_proto(request.spec), device_memory_bytes=asked_bytes)
        return _estimate_to_proto(found)

    def _base_model(self, entry: BaseModelEntry) -> model_pb2.BaseModel:
        known = None if entry.path is None else remembered_sha256(entry.path, memo_dir=self._cache_dir / "digests")
        return model_pb2.BaseModel(name=entry.name, sha256=known or "", max_sequence_length=entry.max_sequence_length)


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """What the attempt that the caller's token names has to say."""

    def __init__(self, attempts: Attempts) -> None:
        self._attempts = attempts

    async def GetAssignment(self, request: worker_pb2.GetAssignmentRequest, context: Context) -> worker_pb2.Assignment:
        found = await self._attempts.assignment(_lease())
        return worker_pb2.Assignment(
            project=found.project,
            job_id=found.job_id,
            epoch=found.epoch,
            spec=found.spec.to_proto(spec_pb2.TrainingSpec),
            training_dataset=artifact_to_proto(found.training_dataset),
            validation_dataset=None if found.validation_dataset is None else artifact_to_proto(found.validation_dataset),
            checkpoint=None if found.checkpoint is None else artifact_to_proto(found.checkpoint),
            traceparent=found.traceparent,
        )

    async def Heartbeat(self, request: worker_pb2.HeartbeatRequest, context: Context) -> worker_pb2.WorkerCommand:
        return _command_to_proto(await self._attempts.heartbeat(_lease(), phase=request.phase))

    async def ReportStep(self, request: worker_pb2.ReportStepRequest, context: Context) -> worker_pb2.WorkerCommand:
        return _command_to_proto(await self._attempts.step(_lease(), report=_metrics_from_proto(request.metrics)))

    async def ReportCheckpoint(self, request: worker_pb2.ReportCheckpointRequest, context: Context) -> worker_pb2.WorkerCommand:
        report = CheckpointReport(
            step=request.step,
            state=artifact_from_proto(request.state) if request.HasField("state") else None,
            adapter=artifact_from_proto(request.adapter) if request.HasField("adapter") else None,
            metrics=_metrics_from_proto(request.metrics),
        )
        return _command_to_proto(await self._attempts.checkpoint(_lease(), report=report))

    async def FinishAttempt(self, request: worker_pb2.FinishAttemptRequest, context: Context) -> worker_pb2.FinishAttemptResponse:
        await self._attempts.finish(
            _lease(),
            state=state_from_proto(request.state),
            error=error_from_proto(request.error) if request.HasField("error") else None,
            adapter=artifact_from_proto(request.adapter) if request.HasField("adapter") else None,
            model=artifact_from_proto(request.model) if request.HasField("model") else None,
            metrics_file=artifact_from_proto(request.metrics_file) if request.HasField("metrics_file") else None,
        )
        return worker_pb2.FinishAttemptResponse()


def servicers(training: TrainingServicer, worker: WorkerServicer) -> list[Servicer]:
    """Both services as RpcServer takes them."""
    return [
        Servicer("finery.training.v1.TrainingService", partial(training_pb2_grpc.add_TrainingServiceServicer_to_server, training)),
        Servicer("finery.training.v1.WorkerService", partial(worker_pb2_grpc.add_WorkerServiceServicer_to_server, worker)),
    ]


def job_to_proto(job: Job) -> training_pb2.Job:
    """A job as the wire has it."""
    request, metrics, deployment = request_of(job), metrics_of(job), deployment_of(job)
    adapter, model, metrics_file = (artifact_of(job, key) for key in ("adapter", "model", "metrics_file"))
    return training_pb2.Job(
        name=f"projects/{job.project}/jobs/{job.id}",
        training_file=request.training_file,
        validation_file=request.validation_file,
        spec=request.spec.to_proto(spec_pb2.TrainingSpec),
        suffix=request.suffix,
        metadata=job.metadata,
        deploy=request.deploy,
        state=state_to_proto(job.state),
        error=error_to_proto(job.error),
        metrics=None if metrics is None else training_pb2.StepMetrics(**metrics.to_fields()),
        adapter=None if adapter is None else artifact_to_proto(adapter),
        metrics_file=None if metrics_file is None else artifact_to_proto(metrics_file),
        deployment=training_pb2.JobDeployment(
            state=f"DEPLOYMENT_STATE_{deployment.state}",
            alias=deployment.alias,
            message=deployment.message,
        ),
        create_time=timestamp(job.created_at),
        start_time=timestamp(job.started_at),
        finish_time=timestamp(job.finished_at),
        estimated_finish_time=timestamp(estimated_finish_of(job)) if job.state == "RUNNING" else None,
        training_dataset=text_of(job, "training_dataset"),
        validation_dataset=text_of(job, "validation_dataset"),
        model=None if model is None else artifact_to_proto(model),
    )


def _checkpoint_to_proto(item: Checkpoint, *, job_name: str) -> training_pb2.Checkpoint:
    return training_pb2.Checkpoint(
        name=f"{job_name}/checkpoints/{item.step}",
        step=item.step,
        metrics=training_pb2.StepMetrics(**item.metrics.to_fields()),
        adapter=artifact_to_proto(item.adapter),
        alias=item.alias,
        create_time=timestamp(item.created_at),
    )


def _estimate_to_proto(found: ResourceEstimate) -> training_pb2.EstimateResourcesResponse:
    parts = found.parts
    gpu_memory = training_pb2.GpuMemory(
        weights_bytes=parts.weights_bytes,
        adapters_bytes=parts.adapters_bytes,
        gradients_bytes=parts.gradients_bytes,
        optimizer_states_bytes=parts.optimizer_states_bytes,
        activations_bytes=parts.activations_bytes,
        workspace_bytes=parts.workspace_bytes,
        total_bytes=parts.total_bytes,
    )
    gpus = [
        training_pb2.VisibleGpu(index=gpu.index, name=gpu.name, total_bytes=gpu.total_bytes, free_bytes=gpu.free_bytes, fits=fits)
        for gpu, fits in zip(found.gpus, found.fitting, strict=True)
    ]
    return training_pb2.EstimateResourcesResponse(gpu_memory=gpu_memory, host_bytes=parts.host_bytes, gpus=gpus, fits=found.fits)


def _metrics_from_proto(message: training_pb2.StepMetrics) -> StepMetrics:
    fields = [field for field in message.DESCRIPTOR.fields if not field.has_presence or message.HasField(field.name)]
    return StepMetrics(**{field.name: getattr(message, field.name) for field in fields})


def _command_to_proto(command: Command) -> worker_pb2.WorkerCommand:
    return worker_pb2.WorkerCommand(action=f"WORKER_ACTION_{command}")


def _named(name: str) -> tuple[str, str]:
    parsed = parse_name(name, collection="jobs", project=require_project())
    return parsed.project, parsed.id


def _lease() -> Lease:
    _, job_id, epoch = require_attempt()
    return Lease(job_id, epoch)
