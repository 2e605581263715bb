"""The real gateway on a real port, between real clients and fakes at its edges: the inner services over gRPC, vLLM on a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import uvicorn
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from openai import AsyncOpenAI
from vllm_stand_in import BASE, REPLICA_TOKEN, FakeVllm

from finery.common.v1 import job_pb2, model_pb2
from finery.conversion.v1 import conversion_pb2, conversion_pb2_grpc
from finery.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery.training.v1 import training_pb2, training_pb2_grpc
from finery_common.database import Database
from finery_common.errors import (
    AbortedError,
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from finery_common.resource_names import parse_name
from finery_common.rpc.channel import ServiceChannel
from finery_common.rpc.server import RpcServer, Servicer, token_authenticator
from finery_common.rpc.tokens import TokenSigner, require_project
from finery_common.spec import TrainingSpec
from finery_gateway.app import create_app
from finery_gateway.client import ConversionClient, DatasetClient, ServingClient, TrainingClient
from finery_gateway.context import Gateway
from finery_gateway.creates import Creates
from finery_gateway.files import Files
from finery_gateway.http_server import http_protocol
from finery_gateway.keys import KeyStore
from finery_gateway.limit_table import LimitTable
from finery_gateway.proxy import Proxy
from finery_gateway.routes import Routes
from finery_gateway.server import CALLER, PublicRpc, Targets
from finery_gateway.tables import migrate

SIGNER = TokenSigner("s" * 40)
UPLOAD_LIMIT_BYTES = 40 * 1024 * 1024
BODY_LIMIT_BYTES = 100_000


def _now() -> Timestamp:
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp


class FakeTraining(training_pb2_grpc.TrainingServiceServicer):
    """Jobs in memory; a test moves them on by hand."""

    def __init__(self) -> None:
        self.jobs: dict[str, training_pb2.Job] = {}
        self.requests: dict[tuple[str, str], tuple[bytes, str]] = {}
        self.events: dict[str, list[job_pb2.JobEvent]] = {}
        self.checkpoints: dict[str, list[training_pb2.Checkpoint]] = {}
        self.answers_lost = 0

    def job(self, job_id: str) -> training_pb2.Job:
        return next(job for name, job in self.jobs.items() if name.endswith(job_id))

    async def CreateJob(self, request, context):
        project = require_project()
        # As the training service does: what comes in is a whole spec or an error.
        TrainingSpec.from_proto(request.job.spec)
        if request.job.spec.base_model != BASE:
            raise InvalidArgumentError(f"base_model: got {request.job.spec.base_model!r}, wanted one of {BASE}", param="base_model")
        body = request.job.SerializeToString(deterministic=True)
        known = self.requests.get((project, request.request_id))
        if known is not None:
            if known[0] != body:
                raise AlreadyExistsError("the request id made a job from another body")
            return self.jobs[known[1]]
        name = f"projects/{project}/jobs/ftjob-{secrets.token_hex(12)}"
        job = training_pb2.Job()
        job.CopyFrom(request.job)
        job.name, job.state = name, job_pb2.JOB_STATE_QUEUED
        job.create_time.CopyFrom(_now())
        self.jobs[name] = job
        self.requests[(project, request.request_id)] = (body, name)
        if self.answers_lost:
            self.answers_lost -= 1
            raise UnavailableError("the answer was lost", retry_after_s=0.1)
        return job

    def _find(self, name: str) -> training_pb2.Job:
        parsed = parse_name(name, collection="jobs", project=require_project())
        if name not in self.jobs:
            raise NotFoundError(f"There is no job {parsed.id}.")
        return self.jobs[name]

    async def GetJob(self, request, context):
        return self._find(request.name)

    async def ListJobs(self, request, context):
        project = require_project()
        jobs = [job for name, job in reversed(self.jobs.items()) if name.startswith(f"projects/{project}/")]
        jobs = [job for job in jobs if all(job.metadata.get(key) == value for key, value in request.metadata.items())]
        ids = [job.name.rsplit("/", 1)[-1] for job in jobs]
        start = ids.index(request.page_token) + 1 if request.page_token else 0
        page = jobs[start : start + request.page_size]
        more = start + request.page_size < len(jobs)
        return training_pb2.ListJobsResponse(jobs=page, next_page_token=page[-1].name.rsplit("/", 1)[-1] if more else "")

    async def CancelJob(self, request, context):
        job = self._find(request.name)
        job.state = job_pb2.JOB_STATE_CANCELLED
        return job

    async def PauseJob(self, request, context):
        job = self._find(request.name)
        job.state = job_pb2.JOB_STATE_PAUSED
        return job

    async def ResumeJob(self, request, context):
        job = self._find(request.name)
        job.state = job_pb2.JOB_STATE_QUEUED
        return job

    async def WatchJob(self, request, context):
        for event in self.events.get(self._find(request.name).name, []):
            if event.sequence > request.after_sequence:
                yield event

    async def ListEvents(self, request, context):
        events = self.events.get(self._find(request.parent).name, [])
        before = int(request.page_token) if request.page_token else 1 << 60
        found = [event for event in reversed(events) if event.sequence < before]
        page = found[: request.page_size]
        return training_pb2.ListEventsResponse(events=page, next_page_token=str(page[-1].sequence) if len(found) > len(page) else "")

    async def ListCheckpoints(self, request, context):
        job = self._find(request.parent)
        return training_pb2.ListCheckpointsResponse(checkpoints=self.checkpoints.get(job.name, []))

    async def ListBaseModels(self, request, context):
        return training_pb2.ListBaseModelsResponse(base_models=[model_pb2.BaseModel(name=BASE, max_sequence_length=8192)])

    async def EstimateResources(self, request, context):
        assert request.parent == f"projects/{require_project()}"
        spec = TrainingSpec.from_proto(request.spec)
        fits = request.device_memory_bytes >= 100 if request.HasField("device_memory_bytes") else None
        memory = training_pb2.GpuMemory(weights_bytes=60, adapters_bytes=spec.lora.rank, total_bytes=100)
        gpu = training_pb2.VisibleGpu(index=1, name="H200", total_bytes=200, free_bytes=150, fits=True)
        return training_pb2.EstimateResourcesResponse(gpu_memory=memory, host_bytes=7, gpus=[gpu], fits=fits)


class FakeServing(serving_pb2_grpc.ServingServiceServicer):
    """Aliases in memory; every model is served by one fake vLLM."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.more_addresses: list[str] = []
        # The vLLM of each further base model, by name.
        self.more_bases: dict[str, str] = {}
        self.aliases: dict[str, serving_pb2.Alias] = {}
        self.resolved: list[str] = []
        self.cold: set[str] = set()
        self.loading: asyncio.Event | None = None
        self.changed = asyncio.Event()
        self.requests: list[tuple[str, str]] = []

    def split(self, project: str, alias: str, version: str, *, weight: int) -> serving_pb2.Alias:
        """Makes `version` the alias' canary, or changes its weight; 0 drops it."""
        made = self.aliases[f"projects/{project}/aliases/{alias}"]
        if weight:
            made.canary.version, made.canary.weight = version, weight
        else:
            made.ClearField("canary")
        self._touch(made)
        return made

    def _touch(self, alias: serving_pb2.Alias) -> None:
        alias.epoch += 1
        alias.etag = f"e{alias.epoch}"
        self.changed.set()

    def flip(self, project: str, alias: str, version: str, *, job_id: str = "") -> serving_pb2.Alias:
        name = f"projects/{project}/aliases/{alias}"
        epoch = self.aliases[name].epoch + 1 if name in self.aliases else 1
        made = serving_pb2.Alias(
            name=name, alias=alias, base_model=BASE, version=version, epoch=epoch, etag=f"e{epoch}", job_id=job_id, create_time=_now()
        )
        made.rollout.state = serving_pb2.ROLLOUT_STATE_READY
        self.aliases[name] = made
        self.changed.set()
        return made

    async def ListDeployments(self, request, context):
        replica = serving_pb2.Replica(id="r0", ready=True, start_time=_now())
        bases = [
            serving_pb2.Deployment(base_model=name, base_model_sha256="a" * 64, replicas=[replica], max_lora_rank=16, max_model_len=8192)
            for name in (BASE, *self.more_bases)
        ]
        return serving_pb2.ListDeploymentsResponse(deployments=bases)

    async def DeployAdapter(self, request, context):
        name = f"projects/{require_project()}/aliases/{request.alias}"
        if request.etag and (name not in self.aliases or self.aliases[name].etag != request.etag):
            raise AbortedError("the alias has another etag")
        version = f"{request.adapter.prefix.split('/')[-2]}-cafe0123"
        if request.HasField("canary_weight"):
            return self.split(require_project(), request.alias, version, weight=request.canary_weight)
        return self.flip(require_project(), request.alias, version)

    def _change(self, method: str, request) -> serving_pb2.Alias:
        alias = self._find(request.name)
        if request.etag and request.etag != alias.etag:
            raise AbortedError("the alias has another etag")
        self.requests.append((method, getattr(request, "request_id", "")))
        return alias

    async def SetCanaryWeight(self, request, context):
        alias = self._change("SetCanaryWeight", request)
        return self.split(require_project(), alias.alias, alias.canary.version, weight=request.weight)

    async def PromoteAlias(self, request, context):
        alias = self._change("PromoteAlias", request)
        if not alias.HasField("canary"):
            raise FailedPreconditionError("the alias has no canary")
        alias.previous.version, alias.version = alias.version, alias.canary.version
        return self.split(require_project(), alias.alias, "", weight=0)

    async def RollBackAlias(self, request, context):
        return self.split(require_project(), self._change("RollBackAlias", request).alias, "", weight=0)

    async def PinAlias(self, request, context):
        self._find(request.name).pinned = True
        return self._find(request.name)

    async def UnpinAlias(self, request, context):
        self._find(request.name).pinned = False
        return self._find(request.name)

    def _find(self, name: str) -> serving_pb2.Alias:
        parse_name(name, collection="aliases", project=require_project())
        if name not in self.aliases:
            raise NotFoundError("There is no such alias.")
        return self.aliases[name]

    async def GetAlias(self, request, context):
        return self._find(request.name)

    async def ListAliases(self, request, context):
        prefix = f"projects/{require_project()}/"
        return serving_pb2.ListAliasesResponse(aliases=[alias for name, alias in self.aliases.items() if name.startswith(prefix)])

    async def DeleteAlias(self, request, context):
        alias = self._find(request.name)
        if request.etag and request.etag != alias.etag:
            raise AbortedError("the alias has another etag")
        del self.aliases[request.name]
        return Empty()

    async def WatchAliases(self, request, context):
        while True:
            self.changed.clear()
            for alias in [alias for name, alias in self.aliases.items() if name.startswith(request.parent)]:
                yield serving_pb2.AliasEvent(alias=alias)
            await self.changed.wait()

    async def ResolveModel(self, request, context):
        self.resolved.append(request.model)
        if self.loading is not None:
            await self.loading.wait()
        if request.model in self.cold:
            raise DeadlineExceededError("still loading")
        if request.model == BASE:
            return serving_pb2.Route(version=BASE, base_model=BASE, targets=[self._target(BASE, 100)])
        if request.model in self.more_bases:
            replica = serving_pb2.RouteReplica(address=self.more_bases[request.model], token=REPLICA_TOKEN)
            target = serving_pb2.RouteTarget(version=request.model, weight=100, replicas=[replica])
            return serving_pb2.Route(version=request.model, base_model=request.model, targets=[target])
        alias = self._find(f"{request.parent}/aliases/{request.model}")
        targets = [self._target(alias.version, 100 - alias.canary.weight)]
        if alias.HasField("canary"):
            targets.append(self._target(alias.canary.version, alias.canary.weight))
        return serving_pb2.Route(version=alias.version, epoch=alias.epoch, base_model=BASE, targets=targets)

    def _target(self, version, weight):
        replicas = [serving_pb2.RouteReplica(address=address, token=REPLICA_TOKEN) for address in (self.address, *self.more_addresses)]
        return serving_pb2.RouteTarget(version=version, weight=weight, replicas=replicas)


class FakeDatasets(dataset_pb2_grpc.DatasetServiceServicer):
    def __init__(self) -> None:
        self.datasets: dict[str, dataset_pb2.Dataset] = {}

    async def CreateDataset(self, request, context):
        name = f"projects/{require_project()}/datasets/ds-{secrets.token_hex(12)}"
        made = dataset_pb2.Dataset(name=name, spec=request.spec, state=job_pb2.JOB_STATE_RUNNING, create_time=_now())
        self.datasets[name] = made
        return made

    async def GetDataset(self, request, context):
        parse_name(request.name, collection="datasets", project=require_project())
        if request.name not in self.datasets:
            raise NotFoundError("There is no such dataset.")
        return self.datasets[request.name]

    async def ListDatasets(self, request, context):
        prefix = f"projects/{require_project()}/"
        return dataset_pb2.ListDatasetsResponse(datasets=[item for name, item in self.datasets.items() if name.startswith(prefix)])

    async def DeleteDataset(self, request, context):
        del self.datasets[request.name]
        return Empty()

    async def WatchDataset(self, request, context):
        parse_name(request.name, collection="datasets", project=require_project())
        for sequence in range(request.after_sequence + 1, 4):
            yield job_pb2.JobEvent(sequence=sequence, type="state", message=f"event {sequence}", create_time=_now())


class FakeConversions(conversion_pb2_grpc.ConversionServiceServicer):
    """Conversions in memory; a test gives them what they publish."""

    def __init__(self) -> None:
        self.conversions: dict[str, conversion_pb2.Conversion] = {}

    async def CreateConversion(self, request, context):
        name = f"projects/{require_project()}/conversions/conv-{secrets.token_hex(12)}"
        made = conversion_pb2.Conversion(name=name, spec=request.spec, state=job_pb2.JOB_STATE_QUEUED, create_time=_now())
        self.conversions[name] = made
        return made

    async def GetConversion(self, request, context):
        parse_name(request.name, collection="conversions", project=require_project())
        if request.name not in self.conversions:
            raise NotFoundError("There is no such conversion.")
        return self.conversions[request.name]


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _running(app, **options) -> AsyncIterator[int]:
    server = _Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1, **options))
    sockets = None
    if "uds" not in options:
        sockets = [socket.create_server(("127.0.0.1", 0))]
    serving = asyncio.create_task(server.serve(sockets=sockets))
    async with asyncio.timeout(10):
        while not server.started:  # noqa: ASYNC110 - uvicorn tells in no other way
            await asyncio.sleep(0.01)
    try:
        yield sockets[0].getsockname()[1] if sockets else 0
    finally:
        server.should_exit = True
        await serving


class Clock:
    """The clock of the keys' limits: it stands, unless a test lets it run."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._running_since_s: float | None = None

    def run(self) -> None:
        self._running_since_s = time.monotonic()

    def __call__(self) -> float:
        return self.now_s + (0.0 if self._running_since_s is None else time.monotonic() - self._running_since_s)


@dataclass
class World:
    """Everything a test touches."""

    url: str
    grpc_address: str
    api_key: str
    gateway: Gateway
    training: FakeTraining
    serving: FakeServing
    datasets: FakeDatasets
    conversions: FakeConversions
    vllm: FakeVllm
    project: str
    clock: Clock

    def client(self, api_key: str | None = None, *, max_retries: int = 0) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key or self.api_key, max_retries=max_retries)

    async def upload(self, content: bytes = b'{"messages": []}\n') -> str:
        async with self.client() as client:
            return (await client.files.create(file=("rows.jsonl", content), purpose="fine-tune")).id


@pytest.fixture
def log_content() -> bool:
    """A test may log content by its own fixture of this name."""
    return False


@pytest.fixture
async def world(tmp_path: Path, object_store, log_content: bool) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        vllm = FakeVllm()
        uds = str(tmp_path / "v.sock")
        await stack.enter_async_context(_running(vllm, uds=uds, lifespan="off"))
        training, serving, datasets = FakeTraining(), FakeServing(f"unix://{uds}"), FakeDatasets()
        conversions = FakeConversions()
        inner = RpcServer(
            address="127.0.0.1:0",
            servicers=[
                Servicer("finery.training.v1.TrainingService", partial(training_pb2_grpc.add_TrainingServiceServicer_to_server, training)),
                Servicer("finery.serving.v1.ServingService", partial(serving_pb2_grpc.add_ServingServiceServicer_to_server, serving)),
                Servicer("finery.dataset.v1.DatasetService", partial(dataset_pb2_grpc.add_DatasetServiceServicer_to_server, datasets)),
                Servicer(
                    "finery.conversion.v1.ConversionService",
                    partial(conversion_pb2_grpc.add_ConversionServiceServicer_to_server, conversions),
                ),
            ],
            authenticate=token_authenticator(SIGNER),
        )
        target = f"127.0.0.1:{await inner.start()}"
        stack.push_async_callback(partial(inner.stop, drain_s=0))
        channel = ServiceChannel(target, signer=SIGNER, caller=CALLER)
        stack.push_async_callback(channel.close)
        db = await Database.open(f"sqlite:///{tmp_path / 'gateway.sqlite'}", schema="gateway")
        stack.push_async_callback(db.close)
        await migrate(db)
        keys, creates = KeyStore(db), Creates(db)
        clock = Clock()
        limits = LimitTable.open(tmp_path / "limits", clock=clock)
        stack.callback(limits.close)
        serving_client = ServingClient(channel)
        training_client = TrainingClient(channel)
        proxy = Proxy(Routes(serving_client, training=training_client, cold_wait_s=1), secret="s" * 40, timeout_s=10)
        stack.push_async_callback(proxy.close)
        gateway = Gateway(
            db=db,
            store=object_store,
            keys=keys,
            limits=limits,
            creates=creates,
            files=Files(db, store=object_store, creates=creates, limit_bytes=UPLOAD_LIMIT_BYTES),
            training=training_client,
            datasets=DatasetClient(channel),
            conversions=ConversionClient(channel),
            serving=serving_client,
            proxy=proxy,
        )
        project = f"p-{secrets.token_hex(6)}"
        _, api_key = await keys.create(project)
        targets = Targets(dataset=target, training=target, conversion=target, serving=target)
        rpc = PublicRpc(address="127.0.0.1:0", targets=targets, keys=keys, signer=SIGNER)
        grpc_port = await rpc.start()
        stack.push_async_callback(partial(rpc.stop, drain_s=0))
        app = create_app(gateway, body_limit_bytes=BODY_LIMIT_BYTES, log_content=log_content)
        port = await stack.enter_async_context(_running(app, http=http_protocol()))
        url, grpc_address = f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}"
        yield World(url, grpc_address, api_key, gateway, training, serving, datasets, conversions, vllm, project, clock)


@pytest.fixture
async def client(world: World) -> AsyncIterator[AsyncOpenAI]:
    async with world.client() as client:
        yield client


@pytest.fixture
async def stranger(world: World) -> AsyncIterator[AsyncOpenAI]:
    """A client of another project."""
    _, key = await world.gateway.keys.create(f"{world.project}-other")
    async with world.client(key) as client:
        yield client
