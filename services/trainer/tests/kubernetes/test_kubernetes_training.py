"""The training service with workers in a cluster: scheduler, leases and real worker processes, which a small kubelet starts from Jobs."""

from __future__ import annotations

import asyncio
import signal
import socket

import pytest
from kmock import KubernetesError
from prometheus_client.registry import REGISTRY

from finery.common.v1 import job_pb2
from finery.training.v1 import training_pb2
from finery_common.errors import FailedPreconditionError
from finery_trainer.settings import TrainerSettings

JOBS, PODS = "batch/v1/jobs", "v1/pods"
LONG = {
    "num_epochs": 4,
    "batch": {"micro_batch_size": 1, "gradient_accumulation_steps": 1},
    "checkpoint": {"interval_steps": 10},
}
NUM_LONG_STEPS = 4 * 22


@pytest.fixture
def in_cluster(api, system, launcher_fields, template):
    """`system`, whose service launches by Kubernetes; what it starts anew keeps its address, as a Service of a cluster does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    s3 = system.store.settings
    env = {
        "FINERY_STATE_DIR": system.settings.state_dir / "worker",
        "FINERY_CATALOGUE": system.settings.catalogue,
        "FINERY_S3_ENDPOINT": s3.endpoint,
        "FINERY_S3_BUCKET": s3.bucket,
        "FINERY_S3_ACCESS_KEY": s3.access_key,
        "FINERY_S3_SECRET_KEY": s3.secret_key,
        "FINERY_WORKER_HEARTBEAT_S": 0.5,
        "OMP_NUM_THREADS": 1,
    }
    container = template["spec"]["template"]["spec"]["containers"][0]
    container["env"] = [{"name": name, "value": str(value)} for name, value in env.items()]
    system.settings = TrainerSettings(**launcher_fields(grpc_address=address, trainer_address=address))
    return system


def states_of(events):
    return [event["state"].removeprefix("JOB_STATE_") for event in events if event["type"] == "state"]


def has_steps(system, job, count):
    async def is_so() -> bool:
        return len(await system.steps(job.name)) >= count

    return is_so


def has_event(system, job, text):
    async def is_so() -> bool:
        return any(text in event["message"] for event in await system.events(job.name))

    return is_so


async def pause(system, job):
    await system.stub.PauseJob(training_pb2.PauseJobRequest(name=job.name), metadata=system.metadata())


async def resume(system, job):
    await system.stub.ResumeJob(training_pb2.ResumeJobRequest(name=job.name), metadata=system.metadata())


async def cancel(system, job):
    await system.stub.CancelJob(training_pb2.CancelJobRequest(name=job.name), metadata=system.metadata())


@pytest.mark.slow
async def test_a_job_trains_in_a_cluster_through_a_restart_of_the_service_and_a_pause(api, in_cluster, kubelet, wait_until):
    system = in_cluster
    async with system.started():
        job = await system.create(spec=LONG, deploy=False)
        await wait_until(has_steps(system, job, 5), timeout_s=60)
    async with system.started():
        await wait_until(has_steps(system, job, 25), timeout_s=60)
        assert [process.returncode for process in kubelet.processes.values()] == [None], "the same worker goes on"
        await pause(system, job)
        await system.wait(job.name, "PAUSED")
        await resume(system, job)
        job = await system.wait(job.name, "SUCCEEDED")
        steps, events = await system.steps(job.name), await system.events(job.name)
        await wait_until(lambda: _have_ended(api, "Complete"))
    assert steps == list(range(1, NUM_LONG_STEPS + 1)), "each attempt began where the one before had saved its state"
    assert states_of(events)[3:] == ["RUNNING", "PAUSED", "QUEUED", "RUNNING", "SUCCEEDED"]
    assert not any(event["message"].startswith("The worker of attempt") for event in events), "no attempt was lost"
    assert len(kubelet.processes) == 2


async def _have_ended(api, last: str) -> bool:
    """Whether no Job goes on, and the newest has come to the condition `last`."""
    ends = [[condition["type"] for condition in job.get("status", {}).get("conditions", [])] for job in api.live(JOBS)]
    return all(ends) and ends[-1] == [last]


@pytest.mark.slow
async def test_a_disrupted_worker_is_replaced_and_a_cancelled_one_is_not(api, in_cluster, kubelet, wait_until):
    system = in_cluster
    async with system.started():
        job = await system.create(spec=LONG | {"num_epochs": 60}, deploy=False)
        await wait_until(has_steps(system, job, 12), timeout_s=60)
        # What the node sends when it is drained.
        next(iter(kubelet.processes.values())).send_signal(signal.SIGTERM)
        await wait_until(has_event(system, job, "The worker ended with exit status 75; the job goes on from its last checkpoint."))
        seen = len(await system.steps(job.name))
        await wait_until(has_steps(system, job, seen + 5), timeout_s=60)
        steps = await system.steps(job.name)
        await cancel(system, job)
        await system.wait(job.name, "CANCELLED")
        await wait_until(lambda: _have_ended(api, "Complete"))
    assert steps == list(range(1, len(steps) + 1))
    assert len(kubelet.processes) == 2


async def test_a_worker_with_wrong_settings_fails_its_job_at_once(in_cluster, kubelet, template, launcher_fields):
    system = in_cluster
    env = template["spec"]["template"]["spec"]["containers"][0]["env"]
    next(item for item in env if item["name"] == "FINERY_WORKER_HEARTBEAT_S")["value"] = "never"
    launcher_fields()
    async with system.started():
        job = await system.wait((await system.create(deploy=False)).name, "FAILED")
    assert job.error.code == "worker_misconfigured"
    assert "ended with exit status 78" in job.error.message
    assert f"kubectl logs --namespace finery job/{job.name.rpartition('/')[2]}-" in job.error.message
    assert len(kubelet.processes) == 1


async def test_a_worker_that_waits_for_a_node_keeps_its_lease_and_says_why(api, in_cluster, controller, wait_until):
    system = in_cluster
    system.settings = system.settings.model_copy(update={"lease_s": 1.0})
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes: 3 Insufficient GPUs",
    }
    async with system.started():
        job = await system.create(deploy=False)
        await wait_until(lambda: _is_true(api.live(PODS)))
        (pod,), (first,) = api.live(PODS), api.live(JOBS)
        await api.store(PODS, pod | {"status": {"phase": "Pending", "conditions": [condition]}})
        await wait_until(has_event(system, job, "The worker waits: no node takes it (0/3 nodes: 3 Insufficient GPUs)."))
        await asyncio.sleep(2.5)
        assert (await system.get(job.name)).state == job_pb2.JOB_STATE_RUNNING
    async with system.started():
        await asyncio.sleep(2.5)
        assert (await system.get(job.name)).state == job_pb2.JOB_STATE_RUNNING, "nor does a restart lose it"
        assert [item["metadata"]["uid"] for item in api.live(JOBS)] == [first["metadata"]["uid"]], "no attempt was lost"
        await pause(system, job)
        await system.wait(job.name, "PAUSED", timeout_s=10)
        assert api.live(JOBS) == [], "nobody is there to obey, so nothing is waited for"
        await resume(system, job)
        await wait_until(lambda: _is_true(api.live(JOBS)))
        await cancel(system, job)
        await system.wait(job.name, "CANCELLED", timeout_s=10)
        assert api.live(JOBS) == []
        assert sum(event["message"].startswith("The worker waits") for event in await system.events(job.name)) == 1


async def _is_true(value) -> bool:
    return bool(value)


async def test_jobs_keep_their_turn_while_none_can_be_started(api, in_cluster, controller, wait_until):
    system = in_cluster
    api.forbidden.add(("create", "jobs"))
    async with system.started():
        job = await system.create(deploy=False)
        await wait_until(has_event(system, job, "The worker cannot be started for now: The trainer may not create jobs"))
        events = await system.events(job.name)
        await wait_until(lambda: _is_true(_num_creates(api) >= 3), timeout_s=20)
        assert (await system.get(job.name)).state == job_pb2.JOB_STATE_QUEUED
        assert await system.events(job.name) == events, "what is known already is not told again"
        waited_s = REGISTRY.get_sample_value("finery_trainer_oldest_queued_seconds") or 0.0
        assert waited_s > 2, "trying in vain does not make a job's wait shorter"
        api.forbidden.clear()
        await wait_until(lambda: _is_true(api.live(JOBS)), timeout_s=20)
        assert states_of(await system.events(job.name)).count("RUNNING") == 2


def _num_creates(api) -> int:
    return sum(request.method == "POST" for request in api._requests)


async def test_an_api_server_that_is_away_is_told_once_and_starts_nothing(api, in_cluster, controller, wait_until):
    system = in_cluster
    api.is_down = True
    async with system.started():
        job = await system.create(deploy=False)
        await wait_until(has_event(system, job, "The worker cannot be started for now: The Kubernetes API server cannot list"))
        await asyncio.sleep(2)
        events = await system.events(job.name)
        assert "RUNNING" not in states_of(events)
        assert sum("cannot be started" in event["message"] for event in events) == 1


async def test_a_worker_that_its_node_cannot_start_is_tried_again_and_the_job_does_not_fail(api, in_cluster, controller, wait_until):
    system = in_cluster
    async with system.started():
        job = await system.create(deploy=False)
        for number in range(1, 4):
            await wait_until(lambda: _is_true(_pending(api)), timeout_s=20)
            await api.store(PODS, _pending(api)[0] | {"status": {"phase": "Failed", "reason": "OutOfcpu", "message": "no room"}})
            await wait_until(lambda number=number: _has_states(system, job, "QUEUED", count=2 + number), timeout_s=20)
        assert (await system.get(job.name)).state == job_pb2.JOB_STATE_QUEUED
        events = await system.events(job.name)
    assert not any(event["message"].startswith("The worker of attempt") for event in events), "no attempt was lost"
    assert any("it was ended by Kubernetes (OutOfcpu: no room). It is tried again." in event["message"] for event in events)


def _pending(api):
    return [pod for pod in api.live(PODS) if pod["status"]["phase"] == "Pending"]


async def _has_states(system, job, state, *, count) -> bool:
    return states_of(await system.events(job.name)).count(state) >= count


async def test_a_job_that_the_cluster_can_never_start_fails_with_the_reason(api, in_cluster, controller):
    message = "spec.template.spec.containers[0].image: Required value"
    api.refusals["create", "jobs"] = KubernetesError(status=422, reason="Invalid", message=message)
    system = in_cluster
    async with system.started():
        job = await system.wait((await system.create(deploy=False)).name, "FAILED")
    assert "image: Required value" in job.error.message


async def test_more_gpus_than_a_node_has_are_refused_before_there_is_a_job(in_cluster):
    system = in_cluster
    async with system.started():
        with pytest.raises(FailedPreconditionError, match="gpus: got 16, but 8 are visible to the worker; lower it to 8") as caught:
            await system.create(spec={"gpus": 16}, deploy=False)
        await system.create(spec={"gpus": 8}, deploy=False)
    assert caught.value.param == "spec.gpus"
