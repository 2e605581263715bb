"""Jobs trained by real worker processes on a tiny base model, through a real service, database and object store."""

from __future__ import annotations

import asyncio
import csv
import io
import math
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from finery.common.v1 import job_pb2
from finery.dataset.v1 import dataset_pb2
from finery.training.v1 import training_pb2
from finery_common.catalogue import BaseModelEntry, materialize
from finery_common.rpc.messages import artifact_from_proto

LONG = {
    "num_epochs": 6,
    "batch": {"micro_batch_size": 1, "gradient_accumulation_steps": 1},
    "checkpoint": {"interval_steps": 10},
    "optimizer": {"learning_rate": 0.001},
    "lora": {"dropout": 0.1},
}
NUM_LONG_STEPS = 6 * 22


def worker_of(pid: int) -> psutil.Process:
    found = [child for child in psutil.Process(pid).children(recursive=True) if "finery_trainer.worker" in " ".join(child.cmdline())]
    assert len(found) == 1, found
    return found[0]


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def table_of(system, job) -> list[dict[str, str]]:
    with system.store.open(artifact_from_proto(job.metrics_file), "step_metrics.csv") as file:
        return list(csv.DictReader(io.StringIO(file.read().decode())))


def losses_of(system, job) -> list[str]:
    return [row["train_loss"] for row in table_of(system, job)]


async def test_a_file_becomes_a_deployed_adapter(system):
    async with system.started():
        spec = {"num_epochs": 2, "lora": {"rank": 4}}
        job = await system.create(validation_file=system.upload(), suffix="mine", metadata={"team": "a"}, spec=spec)
        assert job.state == job_pb2.JOB_STATE_QUEUED
        events = await system.watched(job.name)
        job = await system.get(job.name)
        checkpoints = (
            await system.stub.ListCheckpoints(training_pb2.ListCheckpointsRequest(parent=job.name), metadata=system.metadata())
        ).checkpoints

    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, (events, system.worker_logs())
    states = [job_pb2.JobState.Name(event.state).removeprefix("JOB_STATE_") for event in events if event.type == "state"]
    assert states == ["QUEUED", "VALIDATING", "QUEUED", "RUNNING", "SUCCEEDED"]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    job_id = job.name.rpartition("/")[2]
    hexadecimal = job_id.removeprefix("ftjob-")
    alias = f"ft:tiny:{system.project}:mine:{hexadecimal}"
    assert (job.deployment.state, job.deployment.alias) == (training_pb2.DEPLOYMENT_STATE_READY, alias)
    assert "The worker is training by the engine's own layers." in [event.message for event in events]
    assert [event.data["state"] for event in events if event.type == "deployment"] == ["PENDING", "READY"]
    assert system.serving.aliases[f"projects/{system.project}/aliases/{alias}"].adapter == job.adapter

    assert [item.step for item in checkpoints] == [6, 3]
    assert [item.alias for item in checkpoints] == [f"{alias}:ckpt-step-6", f"{alias}:ckpt-step-3"]
    assert checkpoints[0].adapter == job.adapter
    assert all(item.metrics.HasField("validation_loss") for item in checkpoints)

    manifest = system.store.manifest(artifact_from_proto(job.adapter))
    assert job.adapter.prefix == f"projects/{system.project}/adapters/{job_id}-6/"
    assert {entry.name for entry in manifest.objects} == {"adapter_config.json", "adapter_model.safetensors"}
    assert manifest.metadata["base_model"] == "tiny"
    assert (manifest.metadata["job_id"], manifest.metadata["step"]) == (job_id, 6)
    assert (manifest.metadata["precision"], manifest.metadata["device"]) == ("float32", "cpu"), "what auto is on a CPU"
    assert manifest.made_from["base_model"] == manifest.metadata["base_model_sha256"]
    assert manifest.spec["lora"]["rank"] == 4

    rows = table_of(system, job)
    head = "step,epoch,train_loss,valid_loss,learning_rate,grad_norm,tokens_per_second,memory_bytes"
    assert ",".join(rows[0]) == head
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [bool(row["valid_loss"]) for row in rows] == [False, False, True, False, False, True]
    steps = [event for event in events if event.type == "step"]
    assert [int(event.data["step"]) for event in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1].data["num_trained_tokens"] == job.metrics.num_trained_tokens > 0
    assert job.start_time.seconds >= job.create_time.seconds
    assert not job.HasField("estimated_finish_time")


async def test_a_killed_worker_and_a_paused_one_go_on_bit_equal(system, wait_until):
    async with system.started():
        straight = await system.create(spec=LONG, deploy=False)
        straight = await system.wait(straight.name, "SUCCEEDED")
        wanted = losses_of(system, straight)
        assert len(wanted) == NUM_LONG_STEPS

        job = await system.create(spec=LONG, deploy=False, training_file=straight.training_file)

        async def has_steps() -> bool:
            return len(await system.steps(job.name)) >= 25

        await wait_until(has_steps, timeout_s=60)
        worker_of(os.getpid()).kill()
        await wait_until(lambda: _is(system, job.name, job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING))

        async def has_more_steps() -> bool:
            return len(await system.steps(job.name)) >= 60

        await wait_until(has_more_steps, timeout_s=60)
        running = await system.get(job.name)
        assert running.estimated_finish_time.seconds >= running.start_time.seconds
        await system.stub.PauseJob(training_pb2.PauseJobRequest(name=job.name), metadata=system.metadata())
        await system.wait(job.name, "PAUSED")
        await system.stub.ResumeJob(training_pb2.ResumeJobRequest(name=job.name), metadata=system.metadata())
        job = await system.wait(job.name, "SUCCEEDED")
        steps = await system.steps(job.name)

    assert losses_of(system, job) == wanted
    assert set(steps) == set(range(1, NUM_LONG_STEPS + 1))
    assert len(steps) < NUM_LONG_STEPS + 12, "each attempt began at the last checkpoint"
    ours, theirs = (system.store.fetch(artifact_from_proto(item.adapter), system.settings.artifact_cache_dir) for item in (job, straight))
    assert (ours / "adapter_model.safetensors").read_bytes() == (theirs / "adapter_model.safetensors").read_bytes()
    kept = [ref.prefix for ref in system.store.list(f"projects/{system.project}/runs/{job.name.rpartition('/')[2]}/checkpoints/")]
    assert [prefix.split("/")[-2] for prefix in kept] == ["130", "132"]


async def _is(system, name, *states) -> bool:
    return (await system.get(name)).state in states


async def test_cancel_stops_within_one_step_and_publishes_nothing(system, wait_until):
    async with system.started():
        job = await system.create(spec=LONG | {"checkpoint": {}, "num_epochs": 30}, deploy=False)

        async def has_steps() -> bool:
            return len(await system.steps(job.name)) >= 1

        await wait_until(has_steps, timeout_s=60)
        await system.stub.CancelJob(training_pb2.CancelJobRequest(name=job.name), metadata=system.metadata())
        job = await system.wait(job.name, "CANCELLED")
        events = await system.events(job.name)
        asked = next(event["sequence"] for event in events if event["message"].startswith("Cancellation"))
        after = [event for event in events if event["type"] == "step" and int(event["sequence"]) > int(asked)]
        assert len(after) <= 1
        again = await system.stub.CancelJob(training_pb2.CancelJobRequest(name=job.name), metadata=system.metadata())
    assert again == job
    assert not job.HasField("adapter")


async def test_a_failure_that_another_attempt_cannot_mend_ends_the_job_with_its_reason(system):
    async with system.started():
        gone = await system.create(spec={"base_model": "gone"}, deploy=False)
        gone = await system.wait(gone.name, "FAILED")
    assert "correct its path in the catalogue" in gone.error.message


async def test_a_job_says_why_transformers_own_modules_train(system):
    async with system.started():
        job = await system.create(spec={"method": "dpo", "max_steps": 1, "lora": {"dropout": 0.1}}, deploy=False)
        job = await system.wait(job.name, "SUCCEEDED")
        messages = [event["message"] for event in await system.events(job.name)]
    assert any(text.startswith("The worker is training by transformers' own modules (") and "dropout" in text for text in messages), (
        messages
    )


async def test_a_service_that_dies_or_restarts_leaves_its_workers_work_whole(system, tmp_path, wait_until):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "FINERY_GRPC_ADDRESS": address}

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "trainer.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "finery_trainer"], env=environment, stdout=log, stderr=log)

    async def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0

    process = start()
    try:
        await wait_until(answers)
        async with system.connected(address):
            job = await system.create(spec=LONG | {"num_epochs": 9}, deploy=False)

            async def has_steps(count: int) -> bool:
                return len(await system.steps(job.name)) >= count

            await wait_until(lambda: has_steps(5), timeout_s=60)
            worker = worker_of(process.pid)
            process.kill()
            process.wait()
            process = start()
            await wait_until(answers)
            seen = len(await system.steps(job.name))
            await wait_until(lambda: has_steps(seen + 10), timeout_s=60)
            assert worker.is_running(), "the same worker goes on"
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 20) == 0
            assert not is_alive(worker), "an orderly end is also that of workers of a process before"
            assert not list(system.settings.state_dir.glob("work/*"))
            process = start()
            await wait_until(answers)
            job = await system.wait(job.name, "SUCCEEDED")
            steps = await system.steps(job.name)
    finally:
        process.terminate()
        process.wait(20)
    assert set(steps) == set(range(1, 199))


async def test_a_file_of_preferences_becomes_a_deployed_adapter_too(system):
    async with system.started():
        spec = {"method": "dpo", "num_epochs": 2, "lora": {"rank": 4}, "dpo": {"beta": 0.5}}
        job = await system.create(validation_file=system.upload(), spec=spec)
        events = await system.watched(job.name)
        job = await system.get(job.name)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, (events, system.worker_logs())
    assert job.deployment.state == training_pb2.DEPLOYMENT_STATE_READY
    assert {spec.type for spec in system.dataprep.specs.values()} == {dataset_pb2.DATASET_TYPE_PREFERENCE}
    assert float(losses_of(system, job)[0]) == pytest.approx(math.log(2), abs=1e-4), "it begins without a preference"
    names = {entry.name for entry in system.store.manifest(artifact_from_proto(job.adapter)).objects}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.slow
async def test_a_model_trained_whole_is_published_as_one_and_goes_on_bit_equal(system, wait_until):
    spec = {key: value for key, value in LONG.items() if key != "lora"} | {"method": "full", "num_epochs": 4}
    async with system.started():
        straight = await system.create(spec=spec, deploy=False)
        straight = await system.wait(straight.name, "SUCCEEDED")
        job = await system.create(spec=spec, deploy=False, training_file=straight.training_file)

        async def has_steps() -> bool:
            return len(await system.steps(job.name)) >= 5

        await wait_until(has_steps, timeout_s=60)
        await system.stub.PauseJob(training_pb2.PauseJobRequest(name=job.name), metadata=system.metadata())
        await system.wait(job.name, "PAUSED")
        await system.stub.ResumeJob(training_pb2.ResumeJobRequest(name=job.name), metadata=system.metadata())
        job = await system.wait(job.name, "SUCCEEDED")
        checkpoints = await system.stub.ListCheckpoints(training_pb2.ListCheckpointsRequest(parent=job.name), metadata=system.metadata())
        events = await system.events(job.name)
        ours, theirs = (system.store.fetch(artifact_from_proto(item.model), system.settings.artifact_cache_dir) for item in (job, straight))
        manifest = system.store.manifest(artifact_from_proto(job.model))
        await system.stub.DeleteJob(training_pb2.DeleteJobRequest(name=straight.name), metadata=system.metadata())

    job_id = job.name.rpartition("/")[2]
    assert job.model.prefix == f"projects/{system.project}/models/{job_id}/"
    assert not job.HasField("adapter")
    assert not checkpoints.checkpoints, "no epoch leaves a model"
    assert job.deployment.state == training_pb2.DEPLOYMENT_STATE_NONE
    assert manifest.kind == "model"
    assert {entry.name for entry in manifest.objects} == {"config.json", "generation_config.json", "model.safetensors"}
    assert (manifest.metadata["job_id"], manifest.metadata["step"]) == (job_id, job.metrics.num_steps)
    assert manifest.made_from["base_model"] == manifest.metadata["base_model_sha256"]
    assert manifest.spec["method"] == "full"
    assert losses_of(system, job)[0] > losses_of(system, job)[-1]
    assert any(event["message"] == f"The model is published as models/{job_id}." for event in events)
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    entry = BaseModelEntry(name="mine", s3_prefix=job.model.prefix, max_sequence_length=64)
    assert materialize(entry, cache_dir=system.settings.artifact_cache_dir, store=system.store) == ours, "it can be a base model"
    left = [ref.prefix for ref in system.store.list(f"projects/{system.project}/models/")]
    assert left == [job.model.prefix], "deleting a job removes its model"


@pytest.mark.slow
async def test_a_run_on_preferences_is_paused_and_resumed(system, wait_until):
    async with system.started():
        job = await system.create(spec=LONG | {"method": "dpo", "num_epochs": 2}, deploy=False)

        async def has_begun() -> bool:
            return bool(await system.steps(job.name))

        await wait_until(has_begun, timeout_s=60)
        await system.stub.PauseJob(training_pb2.PauseJobRequest(name=job.name), metadata=system.metadata())
        await system.wait(job.name, "PAUSED")
        num_before = len(await system.steps(job.name))
        await system.stub.ResumeJob(training_pb2.ResumeJobRequest(name=job.name), metadata=system.metadata())
        job = await system.wait(job.name, "SUCCEEDED")
    assert num_before < 2 * 22
    assert [int(row["step"]) for row in table_of(system, job)] == list(range(1, 2 * 22 + 1))
