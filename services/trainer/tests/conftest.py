"""A tiny base model, datasets made by hand, and a whole training service with small stand-ins for dataprep and serving.

Stand-ins speak gRPC, so everything of the trainer is real: database, object store, scheduler, worker processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.json_format import MessageToDict
from safetensors.numpy import save_file

from finery.common.v1 import job_pb2
from finery.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery.training.v1 import spec_pb2, training_pb2, training_pb2_grpc
from finery_common.artifacts import ArtifactRef, ArtifactStore
from finery_common.errors import FineryError, NotFoundError
from finery_common.rpc.channel import ServiceChannel, stream
from finery_common.rpc.messages import artifact_to_proto
from finery_common.rpc.server import RpcServer, Servicer, token_authenticator
from finery_common.rpc.tokens import TokenSigner
from finery_common.spec import TrainingSpec
from finery_trainer.launchers import Attempt, Exit, Launcher, Waiting
from finery_trainer.service import Service, running
from finery_trainer.settings import TrainerSettings

VOCAB_SIZE = 64
SECRET = "s" * 40
MAX_TOKENS = 64

PREFIXES = {dataset_pb2.DATASET_TYPE_SUPERVISED: ("",), dataset_pb2.DATASET_TYPE_PREFERENCE: ("chosen_", "rejected_")}
WriteRows = Callable[[Path, Sequence[Sequence[int]]], Path]


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices gain nothing from threads, and lose much where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_base_dir(tmp_path_factory) -> Path:
    """A random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows() -> WriteRows:
    """Writes rows of token ids as a dataset of two shards; the second half of each row is labels. Rejected rows are the rows reversed."""

    def write(folder: Path, rows: Sequence[Sequence[int]], *, prefixes: Sequence[str] = ("",)) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        middle = (len(rows) + 1) // 2
        for number, part in enumerate(part for part in (rows[:middle], rows[middle:]) if part):
            masks = [[0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2) for row in part]
            tensors: dict[str, np.ndarray] = {}
            for prefix in prefixes:
                tokens = [token for row in part for token in (reversed(row) if prefix == "rejected_" else row)]
                tensors[f"{prefix}input_ids"] = np.array(tokens, dtype=np.int32)
                tensors[f"{prefix}label_mask"] = np.array([bit for mask in masks for bit in mask], dtype=np.uint8)
                tensors[f"{prefix}row_offsets"] = np.cumsum([0, *(len(row) for row in part)], dtype=np.int64)
            save_file(tensors, folder / f"shard-{number:05}.safetensors")
        return folder

    return write


@pytest.fixture
def tiny_rows() -> list[list[int]]:
    """22 rows of 4 to 20 tokens: with 8 rows a step, the last step of an epoch has 6."""
    random = np.random.default_rng(1)
    return [[int(token) for token in random.integers(3, VOCAB_SIZE, size=int(length))] for length in random.integers(4, 21, size=22)]


class Dataprep(dataset_pb2_grpc.DatasetServiceServicer):
    """Every file becomes the one dataset of its type, unless `errors` knows it. `ready` holds it back, `refusal` answers instead."""

    def __init__(self, store: ArtifactStore, folders: dict[int, Path]) -> None:
        self._store = store
        self._folders = folders
        self._by_request: dict[str, str] = {}
        self.specs: dict[str, dataset_pb2.DatasetSpec] = {}
        self._artifacts: dict[str, ArtifactRef] = {}
        self.errors: dict[str, job_pb2.JobError] = {}
        self.cancelled: set[str] = set()
        self.ready = True
        self.refusal: FineryError | None = None

    async def CreateDataset(self, request, context):
        if self.refusal is not None:
            raise self.refusal
        dataset = self._by_request.setdefault(request.request_id, f"ds-{secrets.token_hex(12)}")
        self.specs[dataset] = request.spec
        return self._dataset(request.parent.split("/")[1], dataset)

    async def GetDataset(self, request, context):
        _, project, _, dataset = request.name.split("/")
        return self._dataset(project, dataset)

    async def CancelDataset(self, request, context):
        self.cancelled.add(request.name.split("/")[3])
        return dataset_pb2.Dataset(name=request.name)

    def _dataset(self, project: str, dataset: str) -> dataset_pb2.Dataset:
        name = f"projects/{project}/datasets/{dataset}"
        if not self.ready:
            return dataset_pb2.Dataset(name=name, state=job_pb2.JOB_STATE_RUNNING)
        if error := self.errors.get(self.specs[dataset].file):
            return dataset_pb2.Dataset(name=name, state=job_pb2.JOB_STATE_FAILED, error=error)
        if dataset not in self._artifacts:
            with self._store.writer(f"{name}/", kind="dataset") as writer:
                writer.put_folder(self._folders[self.specs[dataset].type])
                self._artifacts[dataset] = writer.publish(made_from={}, spec={}, attempt="test")
        return dataset_pb2.Dataset(name=name, state=job_pb2.JOB_STATE_SUCCEEDED, artifact=artifact_to_proto(self._artifacts[dataset]))


class Serving(serving_pb2_grpc.ServingServiceServicer):
    """Deploys at once, but fails the first `failures` rollouts."""

    def __init__(self) -> None:
        self.bases = {"tiny": 32}
        self.failures = 0
        self.request_ids: list[str] = []
        self.aliases: dict[str, serving_pb2.Alias] = {}

    async def ListDeployments(self, request, context):
        served = [serving_pb2.Deployment(base_model=name, max_lora_rank=rank) for name, rank in self.bases.items()]
        return serving_pb2.ListDeploymentsResponse(deployments=served)

    async def DeployAdapter(self, request, context):
        self.request_ids.append(request.request_id)
        name = f"{request.parent}/aliases/{request.alias}"
        alias = serving_pb2.Alias(name=name, alias=request.alias)
        if len(self.request_ids) <= self.failures:
            alias.rollout.state = serving_pb2.ROLLOUT_STATE_FAILED
            alias.rollout.error.message = "the probe gave nonsense"
        else:
            alias.version = "v1"
            alias.adapter.CopyFrom(request.adapter)
            alias.rollout.state = serving_pb2.ROLLOUT_STATE_READY
        self.aliases[name] = alias
        return alias

    async def GetAlias(self, request, context):
        if request.name not in self.aliases:
            raise NotFoundError(f"no alias {request.name}")
        return self.aliases[request.name]

    async def ListAliases(self, request, context):
        return serving_pb2.ListAliasesResponse(aliases=self.aliases.values())


class System:
    """A training service to talk to as a client of project `project`."""

    def __init__(self, settings: TrainerSettings, *, store: ArtifactStore, dataprep: Dataprep, serving: Serving) -> None:
        self.settings = settings
        self.store = store
        self.dataprep = dataprep
        self.serving = serving
        self.project = f"p{secrets.token_hex(6)}"
        self.signer = TokenSigner(SECRET)

    @contextlib.asynccontextmanager
    async def started(self, make_launcher: Callable[[str], Launcher] | None = None) -> AsyncIterator[Service]:
        """The service inside this process; `stub` talks to it."""
        async with running(self.settings, make_launcher=make_launcher) as service, self.connected(service.address):
            yield service

    @contextlib.asynccontextmanager
    async def connected(self, address: str) -> AsyncIterator[None]:
        channel = ServiceChannel(address, signer=self.signer, caller="test")
        self.stub = training_pb2_grpc.TrainingServiceStub(channel.grpc)
        self._channel = channel
        yield
        await channel.close()

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return self._channel.metadata(project=self.project)

    def upload(self, text: str = "rows") -> str:
        file = f"file-{secrets.token_hex(12)}"
        with self.store.writer(f"projects/{self.project}/files/{file}/", kind="file") as writer:
            writer.put_bytes("content", data=text.encode())
            writer.publish(made_from={}, spec={}, attempt="test")
        return file

    def request(self, *, request_id: str | None = None, spec: dict[str, Any] | None = None, **fields: Any) -> training_pb2.CreateJobRequest:
        values = {"base_model": "tiny", "max_sequence_length": 64, **(spec or {})}
        job = training_pb2.Job(
            spec=TrainingSpec.parse(values).to_proto(spec_pb2.TrainingSpec), **{"training_file": self.upload(), **fields}
        )
        return training_pb2.CreateJobRequest(parent=f"projects/{self.project}", job=job, request_id=request_id or secrets.token_hex(8))

    async def create(self, **fields: Any) -> training_pb2.Job:
        return await self.stub.CreateJob(self.request(**fields), metadata=self.metadata())

    async def get(self, name: str) -> training_pb2.Job:
        return await self.stub.GetJob(training_pb2.GetJobRequest(name=name), metadata=self.metadata())

    async def events(self, name: str) -> list[dict[str, Any]]:
        """Every event so far, as plain data."""
        request = training_pb2.ListEventsRequest(parent=name, page_size=1000)
        answer = await self.stub.ListEvents(request, metadata=self.metadata())
        return [MessageToDict(event, preserving_proto_field_name=True) for event in answer.events]

    async def steps(self, name: str) -> list[int]:
        return [int(event["data"]["step"]) for event in await self.events(name) if event["type"] == "step"]

    async def wait(self, name: str, state: str, *, timeout_s: float = 90) -> training_pb2.Job:
        """The job once it is in `state`; fails with its events where another final state comes first."""
        wanted = job_pb2.JobState.Value(f"JOB_STATE_{state}")
        job = await self.get(name)

        async def is_there() -> bool:
            nonlocal job
            job = await self.get(name)
            return job.state == wanted or job.state in FINAL

        await until(is_there, timeout_s=timeout_s)
        assert job.state == wanted, (job_pb2.JobState.Name(job.state), await self.events(name), self.worker_logs())
        return job

    async def watched(self, name: str) -> list[job_pb2.JobEvent]:
        """Every event until the job and its deployment are final."""
        call = self.stub.WatchJob(training_pb2.WatchJobRequest(name=name), metadata=self.metadata())
        return [event async for event in stream(call)]

    def worker_logs(self) -> str:
        return "".join(path.read_text()[-3000:] for path in self.settings.state_dir.glob("logs/*.log"))


FINAL = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


async def until(condition: Callable[[], Awaitable[bool]], *, timeout_s: float = 30) -> None:
    """Returns when `condition` holds; fails where it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline_s, "not in time"
        await asyncio.sleep(0.05)


@pytest.fixture
def wait_until():
    return until


@pytest.fixture
async def system(tmp_path, monkeypatch, object_store, tiny_base_dir, write_rows, tiny_rows) -> AsyncIterator[System]:
    """A training service's surroundings: object store, catalogue, secrets, dataprep, serving."""
    folders = {kind: write_rows(tmp_path / f"rows-{kind}", tiny_rows, prefixes=prefixes) for kind, prefixes in PREFIXES.items()}
    dataprep = Dataprep(object_store, folders)
    serving = Serving()
    neighbours = RpcServer(
        address="127.0.0.1:0",
        servicers=[
            Servicer("finery.dataset.v1.DatasetService", partial(dataset_pb2_grpc.add_DatasetServiceServicer_to_server, dataprep)),
            Servicer("finery.serving.v1.ServingService", partial(serving_pb2_grpc.add_ServingServiceServicer_to_server, serving)),
        ],
        authenticate=token_authenticator(TokenSigner(SECRET)),
    )
    port = await neighbours.start()
    catalogue = tmp_path / "catalogue.yaml"
    catalogue.write_text(
        f"models:\n  - {{name: tiny, path: {tiny_base_dir}, max_sequence_length: 64}}\n"
        f"  - {{name: gone, path: {tmp_path / 'gone'}, max_sequence_length: 64}}\n"
    )
    (tmp_path / "secret").write_text(SECRET)
    s3 = object_store.settings
    environment = {
        "STATE_DIR": tmp_path / "state",
        "CATALOGUE": catalogue,
        "TOKEN_SECRET_FILE": tmp_path / "secret",
        "DATAPREP_ADDRESS": f"127.0.0.1:{port}",
        "SERVING_ADDRESS": f"127.0.0.1:{port}",
        "S3_ENDPOINT": s3.endpoint,
        "S3_BUCKET": s3.bucket,
        "S3_ACCESS_KEY": s3.access_key,
        "S3_SECRET_KEY": s3.secret_key,
        "WORKER_HEARTBEAT_S": 0.5,
    }
    for name, value in environment.items():
        monkeypatch.setenv(f"FINERY_{name}", str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield System(TrainerSettings(), store=object_store, dataprep=dataprep, serving=serving)
    await neighbours.stop(drain_s=0)


class FakeLauncher:
    """Starts nothing: the test plays the worker."""

    def __init__(self) -> None:
        self.address = ""
        self.attempts: list[Attempt] = []
        self.killed: list[str] = []
        self.waits: list[Waiting] = []
        self._exits: list[Exit] = []

    async def attempt(self) -> Attempt:
        """The first, once it is started."""
        async with asyncio.timeout(20):
            while not self.attempts:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return self.attempts[0]

    async def check(self, attempt):
        pass

    async def start(self, attempt):
        self.attempts.append(attempt)

    def end(self, attempt, *, was_stopped=False):
        self._exits.append(Exit(attempt.job_id, attempt.epoch, was_stopped, "was ended by SIGKILL"))

    def take_exits(self):
        exits, self._exits = self._exits, []
        return exits

    def waiting(self):
        return self.waits

    def log_place(self, job_id, *, epoch):
        return f"log {epoch}"

    async def kill(self, job_id):
        self.killed.append(job_id)

    async def stop_all(self, *, grace_s):
        pass


@pytest.fixture
def fake_launcher():
    return FakeLauncher()


@pytest.fixture
async def launcher(system, fake_launcher):
    """The service runs with it."""
    async with system.started(lambda _address: fake_launcher) as service:
        fake_launcher.address = service.address
        yield fake_launcher
