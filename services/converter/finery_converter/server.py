"""ConversionService on the wire: translates, calls, translates back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc.aio
from google.protobuf.empty_pb2 import Empty

from finery.common.v1 import job_pb2
from finery.conversion.v1 import conversion_pb2, conversion_pb2_grpc
from finery_common.artifacts import ArtifactRef, ArtifactStore
from finery_common.conversion_spec import ConversionSpec
from finery_common.errors import FailedPreconditionError
from finery_common.jobs import Job, JobState, JobStore, Wanted
from finery_common.resource_names import ResourceName, parse_name, parse_parent
from finery_common.rpc.messages import artifact_to_proto, error_to_proto, event_to_proto, state_to_proto, struct, timestamp
from finery_common.rpc.server import Servicer
from finery_common.rpc.tokens import require_project
from finery_converter.attempt import model_prefix
from finery_converter.runner import ConversionRunner
from finery_converter.settings import ConverterSettings
from finery_converter.sources import Sources

SERVICE = "finery.conversion.v1.ConversionService"
COLLECTION = "conversions"

Context = grpc.aio.ServicerContext[Any, Any]


class ConversionServicer(conversion_pb2_grpc.ConversionServiceServicer):
    """The conversions of whichever project the caller's credentials name."""

    def __init__(
        self, jobs: JobStore, *, artifacts: ArtifactStore, sources: Sources, runner: ConversionRunner, settings: ConverterSettings
    ) -> None:
        self._jobs = jobs
        self._artifacts = artifacts
        self._sources = sources
        self._runner = runner
        self._settings = settings

    async def CreateConversion(self, request: conversion_pb2.CreateConversionRequest, context: Context) -> conversion_pb2.Conversion:
        project = parse_parent(request.parent, project=require_project())
        spec = ConversionSpec.from_proto(request.spec)
        if not await self._jobs.knows(project, request_id=request.request_id):
            await asyncio.to_thread(self._sources.find, project, spec)
            if spec.hub:
                self._settings.hub_token(project, spec.hub.token)
        job = await self._jobs.create(project, request_id=request.request_id, spec=spec.model_dump(mode="json"))
        self._runner.wake()
        return conversion_to_proto(job)

    async def GetConversion(self, request: conversion_pb2.GetConversionRequest, context: Context) -> conversion_pb2.Conversion:
        return conversion_to_proto(await self._job(request.name))

    async def ListConversions(
        self, request: conversion_pb2.ListConversionsRequest, context: Context
    ) -> conversion_pb2.ListConversionsResponse:
        project = parse_parent(request.parent, project=require_project())
        page = await self._jobs.list(project, page_size=request.page_size, page_token=request.page_token)
        return conversion_pb2.ListConversionsResponse(
            conversions=[conversion_to_proto(job) for job in page.jobs], next_page_token=page.next_page_token
        )

    async def CancelConversion(self, request: conversion_pb2.CancelConversionRequest, context: Context) -> conversion_pb2.Conversion:
        job = await self._job(request.name)
        if job.state != JobState.CANCELLED:
            job = await self._jobs.request(job.id, Wanted.CANCEL)
            self._runner.wake()
        return conversion_to_proto(job)

    async def DeleteConversion(self, request: conversion_pb2.DeleteConversionRequest, context: Context) -> Empty:
        job = await self._job(request.name)
        if not job.state.is_final:
            raise FailedPreconditionError(f"{request.name} is {job.state}; cancel it and wait until it is CANCELLED before deleting it.")
        await asyncio.to_thread(self._artifacts.delete, model_prefix(job.project, job.id))
        await self._jobs.delete(job.id)
        return Empty()

    async def WatchConversion(self, request: conversion_pb2.WatchConversionRequest, context: Context) -> AsyncIterator[job_pb2.JobEvent]:
        job = await self._job(request.name)
        async with contextlib.aclosing(self._jobs.watch(job.id, after_sequence=request.after_sequence)) as events:
            async for event in events:
                yield event_to_proto(event)

    async def _job(self, name: str) -> Job:
        parsed = parse_name(name, collection=COLLECTION, project=require_project())
        return await self._jobs.get(parsed.project, parsed.id)


def servicer_of(servicer: ConversionServicer) -> Servicer:
    """The servicer as RpcServer takes it."""
    return Servicer(SERVICE, partial(conversion_pb2_grpc.add_ConversionServiceServicer_to_server, servicer))


def conversion_to_proto(job: Job) -> conversion_pb2.Conversion:
    """A job of kind conversion as the wire has it."""
    artifact, progress, report = job.result.get("artifact"), job.progress.get("progress", 0.0), job.progress.get("report")
    return conversion_pb2.Conversion(
        name=str(ResourceName(job.project, COLLECTION, job.id)),
        spec=ConversionSpec.parse(job.spec).to_proto(conversion_pb2.ConversionSpec),
        state=state_to_proto(job.state),
        error=error_to_proto(job.error),
        artifact=artifact_to_proto(ArtifactRef.model_validate(artifact)) if artifact else None,
        progress=progress if isinstance(progress, float) else 0.0,
        create_time=timestamp(job.created_at),
        finish_time=timestamp(job.finished_at),
        report=struct(report) if isinstance(report, dict) else None,
        hub=_hub_to_proto(job.result.get("hub")),
        step=str(job.progress.get("step", "")),
    )


def _hub_to_proto(hub: object) -> conversion_pb2.HubPush | None:
    if not isinstance(hub, dict):
        return None
    return conversion_pb2.HubPush(commit_url=hub.get("commit_url", ""), error=error_to_proto(hub.get("error")))
