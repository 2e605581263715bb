"""The conversion service against a real database, a real object store and real worker processes.

Where a test needs a worker to be caught in the middle, llama.cpp's converter, which is a process of its own, is replaced by a program
that waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from google.protobuf.json_format import MessageToDict
from hub_stand_in import Fault, running_hub
from safetensors.torch import load_file, save_file

from finery.common.v1 import job_pb2
from finery.conversion.v1 import conversion_pb2, conversion_pb2_grpc
from finery_common.catalogue import BaseModelEntry, Catalogue, folder_sha256
from finery_common.database import Database
from finery_common.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from finery_common.jobs import JobState, JobStore, migrate
from finery_common.resource_names import new_id
from finery_common.rpc.channel import ServiceChannel, stream
from finery_common.rpc.server import RpcServer, token_authenticator
from finery_common.rpc.tokens import TokenSigner
from finery_converter import recipe
from finery_converter.attempt import Workplace, model_prefix
from finery_converter.gguf import SCRIPT
from finery_converter.runner import ConversionRunner
from finery_converter.server import ConversionServicer, servicer_of
from finery_converter.settings import ConverterSettings
from finery_converter.sources import Sources
from finery_converter.task import Task

SECRET = "s" * 40
BASE_MODEL = "tiny"
# Says that it runs and waits to be killed, unless told to go on; then it is llama.cpp's own.
WAITING_CONVERTER = """
import os, pathlib, runpy, sys, time
here = pathlib.Path(__file__).parent
if "--vocab-only" in sys.argv and not (here / "go").exists():
    (here / "pid").write_text(str(os.getpid()))
    time.sleep(600)
real = pathlib.Path({real!r})
sys.path.insert(0, str(real))
sys.argv[0] = str(real / "convert_hf_to_gguf.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Service:
    """A running converter and a client of it."""

    def __init__(self, *, jobs, runner, channel, artifacts, converter_dir):
        self.jobs = jobs
        self.runner = runner
        self.artifacts = artifacts
        self.converter_dir = converter_dir
        self.channel = channel
        self.stub: Any = conversion_pb2_grpc.ConversionServiceStub(channel.grpc)
        self.project = f"p{secrets.token_hex(6)}"

    def metadata(self, project=None):
        return self.channel.metadata(project=project or self.project)

    async def create(self, adapter, *, project=None, request_id=None, **spec):
        request = conversion_pb2.CreateConversionRequest(
            parent=f"projects/{project or self.project}",
            spec=conversion_pb2.ConversionSpec(adapter=adapter, **spec),
            request_id=request_id or secrets.token_hex(8),
        )
        return await self.stub.CreateConversion(request, metadata=self.metadata(project))

    async def get(self, name):
        return await self.stub.GetConversion(conversion_pb2.GetConversionRequest(name=name), metadata=self.metadata())

    async def watch(self, name, *, after_sequence=0):
        request = conversion_pb2.WatchConversionRequest(name=name, after_sequence=after_sequence)
        return [event async for event in stream(self.stub.WatchConversion(request, metadata=self.metadata()))]

    async def end_of(self, name):
        await self.watch(name)
        return await self.get(name)

    def published(self):
        return list(self.artifacts.list(f"projects/{self.project}/models/"))


@pytest.fixture(scope="module")
def base(make_speaker) -> Path:
    return make_speaker(width=64)


def waiting_converter(folder: Path, real: Path) -> Path:
    """A folder whose converter waits, and is `real`'s otherwise."""
    folder.mkdir()
    (folder / SCRIPT).write_text(WAITING_CONVERTER.format(real=str(real)))
    (folder / "gguf-py").symlink_to(real / "gguf-py")
    (folder / "conversion").symlink_to(real / "conversion")
    return folder


@pytest.fixture(scope="module")
def adapter(base, make_adapter) -> Path:
    return make_adapter(base)


@pytest.fixture
def publish_adapter(object_store, base, tmp_path):
    """Publishes a folder as an adapter of a project, as the trainer does; answers its key there."""

    def publish(folder, *, project, sha256=None) -> str:
        key = f"adapters/{new_id('ftjob-')}-3"
        with object_store.writer(f"projects/{project}/{key}/", kind="adapter") as writer:
            writer.put_file("adapter_config.json", path=folder / "adapter_config.json")
            writer.put_file("adapter_model.safetensors", path=folder / "adapter_model.safetensors")
            digest = sha256 or folder_sha256(base, memo_dir=tmp_path / "digests")
            metadata = {"base_model": BASE_MODEL, "base_model_sha256": digest}
            writer.publish(made_from={"base_model": digest}, spec={}, attempt="test/1", metadata=metadata)
        return key

    return publish


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture
async def service(object_store, base, converter_dir, hub, tmp_path):
    database = await Database.open(f"sqlite:///{tmp_path / 'converter.sqlite'}", schema="converter")
    await migrate(database)
    jobs = JobStore(database, kind="conversion", id_prefix="conv-", poll_interval_s=0.05)
    catalogue = Catalogue([BaseModelEntry(name=BASE_MODEL, path=base, max_sequence_length=64)])
    sources = Sources(object_store, catalogue=catalogue, cache_dir=tmp_path / "cache")
    converter_dir = waiting_converter(tmp_path / "converter", converter_dir)
    hub_settings = {"hub_endpoint": hub.url, "hub_tokens_dir": tmp_path / "hub-tokens"}
    settings = ConverterSettings(state_dir=tmp_path / "state", convert_hf_to_gguf=converter_dir, **hub_settings)
    runner = ConversionRunner(Workplace(jobs, object_store, sources, settings), holder="test")
    servicer = servicer_of(ConversionServicer(jobs, artifacts=object_store, sources=sources, runner=runner, settings=settings))
    signer = TokenSigner(SECRET)
    server = RpcServer(address="127.0.0.1:0", servicers=[servicer], authenticate=token_authenticator(signer))
    channel = ServiceChannel(f"127.0.0.1:{await server.start()}", signer=signer, caller="test")
    running = asyncio.create_task(runner.run())
    yield Service(jobs=jobs, runner=runner, channel=channel, artifacts=object_store, converter_dir=converter_dir)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await channel.close()
    await server.stop(drain_s=0)
    await database.close()


async def _waiting_process(converter_dir: Path) -> psutil.Process:
    """The stand-in for llama.cpp's converter, once it waits."""
    pid_file = converter_dir / "pid"
    async with asyncio.timeout(60):
        while not (pid_file.exists() and pid_file.read_text()):  # noqa: ASYNC110  another process writes it
            await asyncio.sleep(0.05)
    process = psutil.Process(int(pid_file.read_text()))
    pid_file.unlink()
    return process


def _worker(waiting: psutil.Process) -> psutil.Process:
    """The worker that started it."""
    parent = waiting.parent()
    assert parent is not None
    return parent


async def _gone(process: psutil.Process) -> None:
    await asyncio.to_thread(process.wait, 20)


async def test_an_adapter_becomes_a_published_model_with_everything_on_record(service, publish_adapter, adapter, base, tmp_path):
    key = publish_adapter(adapter, project=service.project)
    created = await service.create(key, type=conversion_pb2.OUTPUT_TYPE_F16)
    assert created.state == job_pb2.JOB_STATE_QUEUED
    events = await service.watch(created.name)
    done = await service.get(created.name)

    states = [event.state for event in events if event.type == "state"]
    assert states == [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_VALIDATING, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_SUCCEEDED]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert {"merging", "comparing", "uploading"} <= {MessageToDict(event.data).get("step") for event in events if event.type == "step"}
    assert (done.state, done.progress) == (job_pb2.JOB_STATE_SUCCEEDED, 1.0)

    conversion_id = done.name.rpartition("/")[2]
    assert done.artifact.prefix == f"projects/{service.project}/models/{conversion_id}/"
    manifest = service.artifacts.manifest(done.artifact.prefix)
    adapter_manifest = service.artifacts.manifest(f"projects/{service.project}/{key}/")
    assert manifest.kind == "model"
    assert manifest.made_from == {"adapter": adapter_manifest.sha256, "base_model": adapter_manifest.metadata["base_model_sha256"]}
    assert (manifest.spec["adapter"], manifest.spec["format"], manifest.spec["type"]) == (key, "safetensors", "f16")
    report = MessageToDict(done.report)
    assert manifest.metadata["report"]["parity"]["weights"]["num_wrong"] == 0
    assert report["parity"]["difference"]["rms"] == pytest.approx(manifest.metadata["report"]["parity"]["difference"]["rms"])
    assert set(report["parity"]["perplexity"]) == {"base", "adapter", "converted"}
    assert manifest.attempt == f"{conversion_id}/1"

    folder = service.artifacts.fetch(done.artifact.prefix, tmp_path / "fetched")
    assert {path.name for path in folder.iterdir()} == {path.name for path in base.iterdir()}
    weights = load_file(folder / "model.safetensors")
    assert not any(weights[name].equal(tensor.half()) for name, tensor in load_file(base / "model.safetensors").items() if "_proj" in name)

    listed = await service.stub.ListConversions(
        conversion_pb2.ListConversionsRequest(parent=f"projects/{service.project}"), metadata=service.metadata()
    )
    assert list(listed.conversions) == [done]
    await service.stub.DeleteConversion(conversion_pb2.DeleteConversionRequest(name=done.name), metadata=service.metadata())
    assert service.published() == []
    with pytest.raises(NotFoundError):
        await service.get(done.name)


async def test_a_request_repeated_makes_one_conversion_and_with_another_body_none(service, publish_adapter, adapter):
    key = publish_adapter(adapter, project=service.project)
    first = await service.create(key, request_id="again")
    second = await service.create(key, request_id="again")
    assert second.name == first.name
    with pytest.raises(AlreadyExistsError):
        await service.create(key, request_id="again", type=conversion_pb2.OUTPUT_TYPE_F16)
    await service.end_of(first.name)
    assert len(service.published()) == 1


async def test_an_adapter_unknown_or_of_another_project_is_not_found_at_creation(service, publish_adapter, adapter):
    unknown = f"adapters/{new_id('ftjob-')}-3"
    with pytest.raises(NotFoundError, match=f"There is no {unknown}"):
        await service.create(unknown)
    foreign = publish_adapter(adapter, project="somebody-else")
    with pytest.raises(NotFoundError, match=f"There is no {foreign}") as caught:
        await service.create(foreign)
    assert caught.value.code == "adapter_not_found"
    with pytest.raises(NotFoundError):
        await service.stub.CreateConversion(
            conversion_pb2.CreateConversionRequest(parent="projects/somebody-else", request_id="x"), metadata=service.metadata()
        )


async def test_a_wrong_spec_is_refused_with_its_field(service, publish_adapter, adapter):
    key = publish_adapter(adapter, project=service.project)
    with pytest.raises(InvalidArgumentError, match="got q8_0 with format safetensors, wanted one of bf16, f16"):
        await service.create(key, type=conversion_pb2.OUTPUT_TYPE_Q8_0)
    with pytest.raises(InvalidArgumentError) as caught:
        await service.create("adapters/../../files/x")
    assert caught.value.param == "adapter"


async def test_a_conversion_of_another_project_is_as_unknown_as_one_that_never_was(service, publish_adapter, adapter):
    key = publish_adapter(adapter, project=service.project)
    created = await service.create(key)
    with pytest.raises(NotFoundError):
        await service.stub.GetConversion(conversion_pb2.GetConversionRequest(name=created.name), metadata=service.metadata("somebody-else"))
    with pytest.raises(NotFoundError):
        await service.get(created.name[:-1] + "z")


async def test_an_adapter_of_other_base_weights_fails_and_publishes_nothing(service, publish_adapter, adapter):
    done = await service.end_of((await service.create(publish_adapter(adapter, project=service.project, sha256="0" * 64))).name)
    assert (done.state, done.error.code) == (job_pb2.JOB_STATE_FAILED, "base_model_mismatch")
    assert "0" * 64 in done.error.message
    assert service.published() == []


async def test_an_adapter_key_that_matches_nothing_fails_and_publishes_nothing(service, publish_adapter, adapter, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name.replace("layers.0.mlp", "layers.7.mlp"): tensor for name, tensor in tensors.items()}
    save_file(tensors, changed / "adapter_model.safetensors")
    done = await service.end_of((await service.create(publish_adapter(changed, project=service.project))).name)
    assert (done.state, done.error.code) == (job_pb2.JOB_STATE_FAILED, "unmatched_adapter_tensor")
    assert "layers.7" in done.error.message
    assert service.published() == []


async def test_cancel_kills_the_worker_with_all_it_started_and_publishes_nothing(service, publish_adapter, adapter):
    key = publish_adapter(adapter, project=service.project)
    created = await service.create(key, format=conversion_pb2.OUTPUT_FORMAT_GGUF, type=conversion_pb2.OUTPUT_TYPE_F16)
    process = await _waiting_process(service.converter_dir)
    parent = _worker(process)
    with pytest.raises(FailedPreconditionError, match="is RUNNING; cancel it"):
        await service.stub.DeleteConversion(conversion_pb2.DeleteConversionRequest(name=created.name), metadata=service.metadata())
    cancel = conversion_pb2.CancelConversionRequest(name=created.name)
    await service.stub.CancelConversion(cancel, metadata=service.metadata())
    done = await service.end_of(created.name)
    assert done.state == job_pb2.JOB_STATE_CANCELLED
    await _gone(process)
    assert not parent.is_running()
    assert service.published() == []
    assert (await service.stub.CancelConversion(cancel, metadata=service.metadata())).state == job_pb2.JOB_STATE_CANCELLED


async def test_a_waiting_conversion_is_cancelled_while_another_runs(service, publish_adapter, adapter):
    key = publish_adapter(adapter, project=service.project)
    gguf = {"format": conversion_pb2.OUTPUT_FORMAT_GGUF, "type": conversion_pb2.OUTPUT_TYPE_F16}
    first = await service.create(key, **gguf)
    process = await _waiting_process(service.converter_dir)
    second = await service.create(key, **gguf)
    await service.stub.CancelConversion(conversion_pb2.CancelConversionRequest(name=second.name), metadata=service.metadata())
    assert (await service.end_of(second.name)).state == job_pb2.JOB_STATE_CANCELLED
    assert (await service.get(first.name)).state == job_pb2.JOB_STATE_RUNNING
    assert process.is_running()


async def test_a_worker_killed_9_is_followed_by_another_attempt_that_publishes_once(service, publish_adapter, adapter):
    key = publish_adapter(adapter, project=service.project)
    created = await service.create(key, format=conversion_pb2.OUTPUT_FORMAT_GGUF, type=conversion_pb2.OUTPUT_TYPE_Q8_0)
    process = await _waiting_process(service.converter_dir)
    (service.converter_dir / "go").touch()
    _worker(process).kill()
    await _gone(process)
    events = await service.watch(created.name)
    done = await service.get(created.name)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED
    assert [event.message for event in events if event.level == job_pb2.EVENT_LEVEL_WARN] == [
        "The worker was ended by signal 9. The conversion starts again."
    ]
    [published] = service.published()
    manifest = service.artifacts.manifest(published)
    assert manifest.attempt.endswith("/2")
    assert [entry.name for entry in manifest.objects] == ["Modelfile", "model.q8_0.gguf"]


async def test_a_worker_killed_three_times_fails_the_conversion(service, publish_adapter, adapter):
    key = publish_adapter(adapter, project=service.project)
    created = await service.create(key, format=conversion_pb2.OUTPUT_FORMAT_GGUF, type=conversion_pb2.OUTPUT_TYPE_F16)
    for _ in range(3):
        _worker(await _waiting_process(service.converter_dir)).kill()
    done = await service.end_of(created.name)
    assert (done.state, done.error.code) == (job_pb2.JOB_STATE_FAILED, "worker_died")
    assert service.published() == []


async def test_what_a_dead_attempt_published_ends_the_job_well_even_if_cancelled(service, object_store, publish_adapter, adapter):
    key = publish_adapter(adapter, project=service.project)
    spec = {"adapter": key, "format": "safetensors", "type": "bf16"}
    for request_id, wanted in (("plain", None), ("cancelled", "cancel")):
        job = await service.jobs.create(service.project, request_id=request_id, spec=spec)
        lease = await service.jobs.acquire(job.id, holder="the one that dies", ttl_s=60)
        await service.jobs.transition(job.id, JobState.RUNNING, epoch=lease.epoch)
        with object_store.writer(model_prefix(service.project, job.id), kind="model") as writer:
            ref = writer.publish(made_from={}, spec=spec, attempt=f"{job.id}/1")
        if wanted:
            await service.jobs.request(job.id, wanted)
        await service.jobs.release(lease)
        done = await service.end_of(f"projects/{service.project}/conversions/{job.id}")
        assert done.state == job_pb2.JOB_STATE_SUCCEEDED
        assert done.artifact.manifest_sha256 == ref.manifest_sha256


async def _pushed(service, publish_adapter, adapter, tmp_path, *, token="hf_good"):
    tokens = tmp_path / "hub-tokens" / service.project
    tokens.mkdir(parents=True)
    (tokens / "mine").write_text(token)
    hub = conversion_pb2.HubSpec(repository="ada/merged", token="mine")
    created = await service.create(publish_adapter(adapter, project=service.project), hub=hub)
    return await service.end_of(created.name)


async def test_a_conversion_is_pushed_where_its_spec_says_with_what_it_was_made_of(service, hub, publish_adapter, adapter, tmp_path):
    done = await _pushed(service, publish_adapter, adapter, tmp_path)
    assert (done.state, done.hub.error.code) == (job_pb2.JOB_STATE_SUCCEEDED, "")
    content = hub.content("ada/merged")
    manifest = service.artifacts.manifest(done.artifact.prefix)
    assert {entry.name for entry in manifest.objects} <= set(content)
    assert hashlib.sha256(content["config.json"]).hexdigest() == manifest.entry("config.json").sha256
    assert manifest.sha256 in content["README.md"].decode()
    assert done.hub.commit_url.endswith(hub.commits("ada/merged")[-1].sha)
    assert "hf_good" not in str(await service.watch(done.name))


async def test_a_push_that_is_refused_leaves_a_published_model_and_says_why(service, hub, publish_adapter, adapter, tmp_path):
    done = await _pushed(service, publish_adapter, adapter, tmp_path, token="hf_wrong")
    assert (done.state, done.hub.commit_url, done.hub.error.code) == (job_pb2.JOB_STATE_SUCCEEDED, "", "hub_token_refused")
    assert [ref.prefix for ref in service.published()] == [done.artifact.prefix]


async def test_a_push_is_cancelled_and_the_model_stays(service, hub, publish_adapter, adapter, tmp_path):
    tokens = tmp_path / "hub-tokens" / service.project
    tokens.mkdir(parents=True)
    (tokens / "mine").write_text("hf_good")
    hub.faults.append(Fault("POST", "ada/cancelled/commit", hangs_s=100))
    spec = conversion_pb2.HubSpec(repository="ada/cancelled", token="mine")
    created = await service.create(publish_adapter(adapter, project=service.project), hub=spec)
    async with asyncio.timeout(100):
        while not hub.asked("POST .*ada/cancelled/commit"):  # noqa: ASYNC110  another process asks
            await asyncio.sleep(0.1)
    await service.stub.CancelConversion(conversion_pb2.CancelConversionRequest(name=created.name), metadata=service.metadata())
    async with asyncio.timeout(20):
        done = await service.end_of(created.name)
    assert (done.state, done.hub.error.code) == (job_pb2.JOB_STATE_SUCCEEDED, "hub_push_cancelled")
    assert [ref.prefix for ref in service.published()] == [done.artifact.prefix]


async def test_a_token_that_nobody_has_set_is_said_at_creation(service, publish_adapter, adapter):
    key, hub = publish_adapter(adapter, project=service.project), conversion_pb2.HubSpec(repository="ada/merged", token="nobodys")
    with pytest.raises(FailedPreconditionError, match="There is no Hub token 'nobodys'") as caught:
        await service.create(key, hub=hub)
    assert caught.value.code == "hub_token_missing"


async def test_adapters_of_other_bases_and_a_dataset_of_another_are_refused_at_creation(service, publish_adapter, adapter):
    keys = [publish_adapter(adapter, project=service.project, sha256=digit * 64) for digit in "ab"]
    several = [conversion_pb2.WeightedAdapter(adapter=key) for key in keys]
    with pytest.raises(InvalidArgumentError, match="wanted adapters of one base model"):
        await service.create(None, adapters=several)
    with pytest.raises(NotFoundError) as caught:
        await service.create(keys[0], calibration_dataset="datasets/ds-" + "0" * 24)
    assert caught.value.code == "dataset_not_found"


def test_too_little_disk_is_said_before_anything_is_written_with_the_bytes_needed(base, adapter, tmp_path, monkeypatch):
    (tmp_path / "output").mkdir()
    spec = {"adapter": f"adapters/{new_id('ftjob-')}-3"}
    task = Task(spec, str(base), (str(adapter),), None, "plain", "float32", "cpu", str(tmp_path / "output"), str(tmp_path), "m", "")
    usage = recipe.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(recipe.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(ResourceExhaustedError, match=r"needs [0-9]{2},[0-9]{3},[0-9]{3} bytes .* 1,000,000 are free") as caught:
        recipe.cook(task, lambda step, share: None)
    assert caught.value.code == "disk_full"
    assert list((tmp_path / "output").iterdir()) == []


@pytest.fixture
def environment(seaweedfs, base, converter_dir, tmp_path):
    """What a converter's process needs to start."""
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "catalogue.yaml").write_text(f"models: [{{name: {BASE_MODEL}, path: {base}, max_sequence_length: 64}}]\n")
    converter_dir = waiting_converter(tmp_path / "converter", converter_dir)
    settings = seaweedfs.settings
    return os.environ | {
        "PYTHONSAFEPATH": "1",
        "FINERY_STATE_DIR": str(tmp_path / "state"),
        "FINERY_S3_ENDPOINT": settings.endpoint,
        "FINERY_S3_ACCESS_KEY": settings.access_key,
        "FINERY_S3_SECRET_KEY": settings.secret_key,
        "FINERY_S3_BUCKET": settings.bucket,
        "FINERY_TOKEN_SECRET_FILE": str(tmp_path / "secret"),
        "FINERY_CATALOGUE": str(tmp_path / "catalogue.yaml"),
        "FINERY_CONVERT_HF_TO_GGUF": str(converter_dir),
    }


@contextlib.asynccontextmanager
async def _process(environment, port):
    """`python -m finery_converter`, healthy on `port`."""
    address = f"127.0.0.1:{port}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "finery_converter", env=environment | {"FINERY_GRPC_ADDRESS": address}, stderr=asyncio.subprocess.DEVNULL
    )
    channel = ServiceChannel(address, signer=TokenSigner(SECRET), caller="test")
    try:
        async with asyncio.timeout(60):
            await channel.grpc.channel_ready()
        yield process, channel
    finally:
        await channel.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _is_given_back(state_dir: Path, name: str) -> bool:
    """Whether nobody holds the job's lease, so that the next start does not wait for it to run out."""
    _, project, _, conversion_id = name.split("/")
    database = await Database.open(f"sqlite:///{state_dir / 'db' / 'converter.sqlite'}", schema="converter")
    try:
        job = await JobStore(database, kind="conversion", id_prefix="conv-").get(project, conversion_id)
    finally:
        await database.close()
    return job.lease_expires_at is None and job.state == JobState.RUNNING


@pytest.mark.slow
async def test_a_server_killed_9_takes_its_worker_along_and_the_next_one_starts_the_conversion_again(
    environment, object_store, publish_adapter, adapter, tmp_path, unused_tcp_port_factory
):
    converter_dir = tmp_path / "converter"

    def service_of(channel):
        return Service(jobs=None, runner=None, channel=channel, artifacts=object_store, converter_dir=converter_dir)

    async with _process(environment, unused_tcp_port_factory()) as (process, channel):
        service = service_of(channel)
        project = service.project
        created = await service.create(
            publish_adapter(adapter, project=project), format=conversion_pb2.OUTPUT_FORMAT_GGUF, type=conversion_pb2.OUTPUT_TYPE_F16
        )
        waiting = await _waiting_process(converter_dir)
        process.kill()
        await _gone(waiting)

    async with _process(environment, unused_tcp_port_factory()) as (process, channel):
        waiting = await _waiting_process(converter_dir)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        await _gone(waiting)

    assert await _is_given_back(tmp_path / "state", created.name)
    (converter_dir / "go").touch()
    async with _process(environment, unused_tcp_port_factory()) as (_, channel):
        service = service_of(channel)
        service.project = project
        done = await service.end_of(created.name)
    assert done.state == job_pb2.JOB_STATE_SUCCEEDED
    [published] = service.published()
    assert object_store.manifest(published).attempt.endswith("/3")


def test_the_server_starts_without_torch():
    program = "import finery_converter.__main__, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FINERY_CATALOGUE", "/nowhere.yaml", "Cannot read the catalogue"),
        ("FINERY_S3_ENDPOINT", "", "FINERY_S3_ENDPOINT is not set"),
        ("FINERY_METRICS_PORT", "many", "metrics_port"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(environment, variable, value, said):
    command = [sys.executable, "-m", "finery_converter"]
    done = subprocess.run(command, env=environment | {variable: value}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert said in line
