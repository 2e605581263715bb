"""DatasetService over gRPC, with a real database and a real object store."""

import asyncio
import contextlib
import json
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finery.common.v1 import job_pb2
from finery.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from finery_common.database import Database
from finery_common.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from finery_common.jobs import JobState, JobStore, migrate
from finery_common.resource_names import new_id
from finery_common.rpc.channel import ServiceChannel, stream
from finery_common.rpc.server import RpcServer, token_authenticator
from finery_common.rpc.tokens import TokenSigner
from finery_dataprep.preparation import prepare
from finery_dataprep.runner import DatasetRunner, dataset_prefix
from finery_dataprep.server import DatasetServicer, servicer_of

SIGNER = TokenSigner("s" * 40)
ROW = json.dumps({"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]})
FINAL = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


class Client:
    """A caller of one project."""

    def __init__(self, channel, project):
        self.stub: Any = dataset_pb2_grpc.DatasetServiceStub(channel.grpc)
        self.project = project
        self.metadata = channel.metadata(project=project)

    async def create(self, file, *, request_id=None, base_model="tiny", **spec):
        spec = dataset_pb2.DatasetSpec(file=file, base_model=base_model, **spec)
        request = dataset_pb2.CreateDatasetRequest(parent=f"projects/{self.project}", spec=spec, request_id=request_id or str(uuid.uuid4()))
        return await self.stub.CreateDataset(request, metadata=self.metadata)

    async def get(self, name):
        return await self.stub.GetDataset(dataset_pb2.GetDatasetRequest(name=name), metadata=self.metadata)

    async def list(self, **fields):
        request = dataset_pb2.ListDatasetsRequest(parent=f"projects/{self.project}", **fields)
        return await self.stub.ListDatasets(request, metadata=self.metadata)

    async def cancel(self, name):
        return await self.stub.CancelDataset(dataset_pb2.CancelDatasetRequest(name=name), metadata=self.metadata)

    async def delete(self, name):
        await self.stub.DeleteDataset(dataset_pb2.DeleteDatasetRequest(name=name), metadata=self.metadata)

    def watch(self, name, after_sequence=0):
        request = dataset_pb2.WatchDatasetRequest(name=name, after_sequence=after_sequence)
        return stream(self.stub.WatchDataset(request, metadata=self.metadata))

    async def finished(self, name):
        async with asyncio.timeout(60):
            async for _ in self.watch(name):
                pass
        return await self.get(name)


class Service:
    """One process of the service; several may share a database, as after a restart."""

    def __init__(self, jobs, object_store, folder, scratch_dir, holder):
        def base_folder(name):
            return folder

        def context_limit(name):
            if name != "tiny":
                raise NotFoundError(f"There is no base model {name!r}; there are: tiny.", code="model_not_found")
            return 4096

        self.runner = DatasetRunner(
            jobs, artifacts=object_store, base_folder=base_folder, scratch_dir=scratch_dir, holder=holder, max_workers=2
        )
        servicer = DatasetServicer(jobs, artifacts=object_store, runner=self.runner, context_limit=context_limit)
        self.server = RpcServer(address="127.0.0.1:0", servicers=[servicer_of(servicer)], authenticate=token_authenticator(SIGNER))

    @contextlib.asynccontextmanager
    async def running(self):
        port = await self.server.start()
        task = asyncio.create_task(self.runner.run())
        channel = ServiceChannel(f"127.0.0.1:{port}", signer=SIGNER, caller="test")
        try:
            yield channel
        finally:
            await channel.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.server.stop(drain_s=0)


@pytest.fixture
async def jobs(tmp_path):
    database = await Database.open(f"sqlite:///{tmp_path / 'dataprep.sqlite'}", schema="dataprep")
    await migrate(database)
    yield JobStore(database, kind="dataset", id_prefix="ds-")
    await database.close()


@pytest.fixture
def project():
    return f"p{uuid.uuid4().hex[:12]}"


@pytest.fixture
def make_service(jobs, object_store, tmp_path, make_base):
    def make(holder="one", template="chatml"):
        make_base(template)
        return Service(jobs, object_store, tmp_path / "base", tmp_path / "scratch" / holder, holder)

    return make


@pytest.fixture
async def client(make_service, project):
    async with make_service().running() as channel:
        yield Client(channel, project)


@pytest.fixture
def upload(object_store, project):
    def put(content, *, to=project):
        file_id = new_id("file-")
        with object_store.writer(f"projects/{to}/files/{file_id}/", kind="file") as writer:
            writer.put_bytes("content", data=content.encode())
            writer.publish(made_from={}, spec={}, attempt="gateway", metadata={"filename": "rows.jsonl", "purpose": "fine-tune"})
        return file_id

    return put


async def test_a_file_of_preferences_becomes_a_dataset_of_pairs(client, upload, object_store):
    output = [{"role": "assistant", "content": "answer"}]
    row = {
        "input": {"messages": [{"role": "user", "content": "question"}]},
        "preferred_output": output,
        "non_preferred_output": [{"role": "assistant", "content": "another"}],
    }
    created = await client.create(upload(f"{json.dumps(row)}\n" * 20), type=dataset_pb2.DATASET_TYPE_PREFERENCE)
    dataset = await client.finished(created.name)
    assert dataset.state == job_pb2.JOB_STATE_SUCCEEDED, dataset.error
    assert (dataset.spec.type, dataset.statistics.num_rows) == (dataset_pb2.DATASET_TYPE_PREFERENCE, 20)
    assert object_store.manifest(dataset.artifact.prefix).spec["type"] == "preference"


async def test_a_file_becomes_a_dataset(client, upload, object_store):
    file = upload(f"{ROW}\n" * 20)
    created = await client.create(file, max_sequence_length=512)
    assert created.name.startswith(f"projects/{client.project}/datasets/ds-")
    dataset = await client.finished(created.name)
    assert dataset.state == job_pb2.JOB_STATE_SUCCEEDED, dataset.error
    assert (dataset.spec.file, dataset.spec.base_model, dataset.spec.max_sequence_length) == (file, "tiny", 512)
    assert dataset.statistics.num_rows == 20
    assert dataset.artifact.kind == "dataset"
    manifest = object_store.manifest(dataset.artifact.prefix)
    assert manifest.sha256 == dataset.artifact.manifest_sha256
    assert [entry.name for entry in manifest.objects] == ["shard-00000.safetensors", "statistics.json"]
    assert manifest.made_from == {"file": object_store.manifest(f"projects/{client.project}/files/{file}/").sha256}
    assert manifest.metadata["num_tokens"] == dataset.statistics.num_tokens
    assert set(manifest.metadata) == {"num_rows", "num_tokens", "num_label_tokens", "tokenizer_sha256", "template_sha256", "base_model"}


@pytest.mark.parametrize("rows", [10, 1])
async def test_no_copy_of_a_file_stays(client, upload, tmp_path, rows):
    dataset = await client.finished((await client.create(upload(f"{ROW}\n" * rows))).name)
    assert dataset.state == (job_pb2.JOB_STATE_SUCCEEDED if rows >= 10 else job_pb2.JOB_STATE_FAILED)
    assert [path for path in tmp_path.rglob("*") if path.name == "content"] == []


@pytest.mark.parametrize(("failures", "state"), [(2, job_pb2.JOB_STATE_SUCCEEDED), (3, job_pb2.JOB_STATE_FAILED)])
async def test_what_is_gone_for_the_moment_is_tried_again_and_fails_in_the_end(client, upload, monkeypatch, failures, state):
    lost = iter(range(failures))

    async def prepare_without_memory(*args, **kwargs):
        if next(lost, None) is not None:
            raise UnavailableError("A worker ended.", code="worker_lost")
        return await prepare(*args, **kwargs)

    monkeypatch.setattr("finery_dataprep.runner.MAX_TRIES", 3)
    monkeypatch.setattr("finery_dataprep.runner._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("finery_dataprep.runner.prepare", prepare_without_memory)
    dataset = await client.finished((await client.create(upload(f"{ROW}\n" * 10))).name)
    assert dataset.state == state
    assert dataset.error.code == ("" if state == job_pb2.JOB_STATE_SUCCEEDED else "worker_lost")


async def test_bad_rows_arrive_as_violations_with_their_lines(client, upload):
    created = await client.create(upload(f"{ROW}\n" * 10 + "bad\n"))
    dataset = await client.finished(created.name)
    assert dataset.state == job_pb2.JOB_STATE_FAILED
    assert (dataset.error.code, dataset.error.param) == ("invalid_training_file", "file")
    assert [(item.field, item.line) for item in dataset.error.violations] == [("row", 11)]


async def test_a_deleted_or_foreign_file_fails_as_not_found(client, upload, object_store):
    deleted = upload(f"{ROW}\n" * 10)
    object_store.delete(f"projects/{client.project}/files/{deleted}/")
    foreign = upload(f"{ROW}\n" * 10, to="someone-else")
    for file in (deleted, foreign):
        dataset = await client.finished((await client.create(file)).name)
        assert (dataset.state, dataset.error.code, dataset.error.param) == (job_pb2.JOB_STATE_FAILED, "file_not_found", "file")
        assert dataset.error.message.startswith(f"There is no file {file} in project {client.project}")


async def test_a_create_is_idempotent_by_request_id(client, upload):
    file = upload(f"{ROW}\n" * 10)
    first, second = await client.create(file, request_id="r1"), await client.create(file, request_id="r1")
    assert first.name == second.name
    with pytest.raises(AlreadyExistsError):
        await client.create(file, request_id="r1", max_sequence_length=100)
    assert (await client.create(file, request_id="r2")).name != first.name


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"file": "nonsense"}, InvalidArgumentError, "file"),
        ({"file": new_id("file-"), "max_sequence_length": 0}, InvalidArgumentError, "max_sequence_length"),
        ({"file": new_id("file-"), "max_sequence_length": 5000}, InvalidArgumentError, "got 5000, wanted at most 4096"),
        ({"file": new_id("file-"), "base_model": "nobody"}, NotFoundError, "There is no base model 'nobody'"),
    ],
)
async def test_a_wrong_spec_is_refused_at_once(client, fields, error, words):
    with pytest.raises(error, match=words):
        await client.create(**fields)


async def test_another_project_sees_nothing(client, upload, make_service):
    created = await client.create(upload(f"{ROW}\n" * 10))
    async with make_service("two").running() as channel:
        stranger = Client(channel, "stranger")
        for call in (stranger.get, stranger.cancel, stranger.delete):
            with pytest.raises(NotFoundError):
                await call(created.name)
        assert list((await stranger.list()).datasets) == []


async def test_lists_are_paged_newest_first(client, upload):
    file = upload(f"{ROW}\n" * 10)
    names = [(await client.create(file)).name for _ in range(3)]
    page = await client.list(page_size=2)
    rest = await client.list(page_size=2, page_token=page.next_page_token)
    assert [item.name for item in (*page.datasets, *rest.datasets)] == names[::-1]
    assert rest.next_page_token == ""


async def test_cancel_takes_effect_within_a_second(client, upload, object_store):
    created = await client.create(upload(f"{ROW}\n" * 150_000))
    async for event in client.watch(created.name):
        if "rows_done" in event.data:
            break
    started_s = time.monotonic()
    await client.cancel(created.name)
    dataset = await client.finished(created.name)
    # Notice within the renewal's second, then the workers' end.
    assert time.monotonic() - started_s < 2
    assert dataset.state == job_pb2.JOB_STATE_CANCELLED
    assert not object_store.exists(dataset_prefix(client.project, created.name.rsplit("/", 1)[1]))


async def test_delete_removes_dataset_and_shards_but_not_a_running_one(client, upload, object_store):
    created = await client.create(upload(f"{ROW}\n" * 100_000))
    with pytest.raises(FailedPreconditionError, match="cancel it"):
        await client.delete(created.name)
    await client.cancel(created.name)
    small = await client.finished((await client.create(upload(f"{ROW}\n" * 10))).name)
    await client.delete(small.name)
    with pytest.raises(NotFoundError):
        await client.get(small.name)
    assert not object_store.exists(small.artifact.prefix)
    await client.finished(created.name)


async def test_a_restart_takes_up_what_was_under_way(make_service, project, upload, jobs):
    file = upload(f"{ROW}\n" * 5_000)
    async with make_service("one").running() as channel:
        client = Client(channel, project)
        created = await client.create(file)
        async for event in client.watch(created.name):
            if event.state == job_pb2.JOB_STATE_RUNNING:
                break
    async with make_service("two").running() as channel:
        dataset = await Client(channel, project).finished(created.name)
    assert dataset.state == job_pb2.JOB_STATE_SUCCEEDED, dataset.error
    assert dataset.statistics.num_rows == 5_000
    assert (await jobs.get(project, created.name.rsplit("/", 1)[1])).epoch == 2


async def test_a_process_killed_after_publishing_is_finished_without_publishing_again(make_service, project, upload, jobs, object_store):
    """The killed process is an attempt whose lease ran out: its job is RUNNING, its manifest is there."""
    async with make_service("one").running() as channel:
        template = await Client(channel, project).finished((await Client(channel, project).create(upload(f"{ROW}\n" * 10))).name)
    job = await jobs.create(project, request_id="killed", spec={"file": new_id("file-"), "base_model": "tiny", "max_sequence_length": 512})
    past = JobStore(jobs._db, kind="dataset", id_prefix="ds-", now=lambda: datetime.now(UTC) - timedelta(hours=1))
    lease = await past.acquire(job.id, holder="killed", ttl_s=15)
    await past.transition(job.id, JobState.RUNNING, epoch=lease.epoch)
    with (
        object_store.writer(dataset_prefix(project, job.id), kind="dataset") as writer,
        object_store.open(template.artifact.prefix, "statistics.json") as source,
    ):
        writer.put_bytes("statistics.json", data=source.read())
        published = writer.publish(made_from={}, spec={}, attempt=f"{job.id}/1")
    async with make_service("two").running() as channel:
        dataset = await Client(channel, project).finished(f"projects/{project}/datasets/{job.id}")
    assert dataset.state == job_pb2.JOB_STATE_SUCCEEDED, dataset.error
    assert dataset.artifact.manifest_sha256 == published.manifest_sha256
    assert dataset.statistics.num_rows == 10


async def test_a_template_that_cannot_train_fails_the_dataset_and_not_the_service(make_service, project, upload):
    async with make_service(template="{{ messages | length }}").running() as channel:
        client = Client(channel, project)
        dataset = await client.finished((await client.create(upload(f"{ROW}\n" * 10))).name)
        assert dataset.state == job_pb2.JOB_STATE_FAILED
        assert dataset.error.code == "chat_template_not_supported"
