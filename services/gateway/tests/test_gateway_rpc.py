"""The public gRPC services, as a client with an API key sees them."""

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from finery.common.v1 import job_pb2
from finery.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery.training.v1 import spec_pb2, training_pb2, training_pb2_grpc, worker_pb2, worker_pb2_grpc
from finery_gateway.client import rich_status

BASE = "SmolLM2-135M-Instruct"


@pytest.fixture
async def channel(world):
    async with grpc.aio.insecure_channel(world.grpc_address) as channel:
        yield channel


def _key(key: str):
    return (("authorization", f"Bearer {key}"),)


async def _create(channel: grpc.aio.Channel, world, *, base_model=BASE):
    job = training_pb2.Job(training_file="file-" + "0" * 24, spec=spec_pb2.TrainingSpec(base_model=base_model))
    request = training_pb2.CreateJobRequest(parent=f"projects/{world.project}", job=job, request_id="r1")
    return await training_pb2_grpc.TrainingServiceStub(channel).CreateJob(request, metadata=_key(world.api_key))


async def test_a_call_reaches_the_service_inside_the_keys_project(channel: grpc.aio.Channel, world):
    job = await _create(channel, world)
    assert job.name.startswith(f"projects/{world.project}/jobs/")
    job_id = job.name.rsplit("/", 1)[-1]
    async with world.client() as client:
        assert (await client.fine_tuning.jobs.retrieve(job_id)).id == job_id


async def test_one_project_never_sees_anothers_by_grpc(channel: grpc.aio.Channel, world):
    job = await _create(channel, world)
    world.serving.flip(world.project, "m", "v1")
    _, key = await world.gateway.keys.create(f"{world.project}-other")
    training, serving = training_pb2_grpc.TrainingServiceStub(channel), serving_pb2_grpc.ServingServiceStub(channel)
    for call in (
        training.GetJob(training_pb2.GetJobRequest(name=job.name), metadata=_key(key)),
        training.CancelJob(training_pb2.CancelJobRequest(name=job.name), metadata=_key(key)),
        serving.GetAlias(serving_pb2.GetAliasRequest(name=f"projects/{world.project}/aliases/m"), metadata=_key(key)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    listed = await training.ListJobs(training_pb2.ListJobsRequest(parent=f"projects/{world.project}", page_size=10), metadata=_key(key))
    assert list(listed.jobs) == []


async def test_a_call_without_or_with_a_wrong_key_is_refused(channel: grpc.aio.Channel):
    stub = training_pb2_grpc.TrainingServiceStub(channel)
    for metadata in ((), _key("sk-finery-wrong")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListBaseModels(training_pb2.ListBaseModelsRequest(), metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_status_comes_back_with_its_details(channel: grpc.aio.Channel, world):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _create(channel, world, base_model="no-such-model")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no-such-model" in (caught.value.details() or "")
    packed = rich_status(caught.value)
    assert packed is not None
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status_pb2.Status.FromString(packed).details)
    assert info.metadata["param"] == "base_model"


async def test_a_watch_is_streamed(channel: grpc.aio.Channel, world):
    job = await _create(channel, world)
    world.training.events[job.name] = [job_pb2.JobEvent(sequence=n) for n in (1, 2, 3)]
    stub = training_pb2_grpc.TrainingServiceStub(channel)
    request = training_pb2.WatchJobRequest(name=job.name, after_sequence=1)
    assert [event.sequence async for event in stub.WatchJob(request, metadata=_key(world.api_key))] == [2, 3]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.WatchJob(training_pb2.WatchJobRequest(name=job.name + "0"), metadata=_key(world.api_key)):
            pass
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_routes_and_workers_are_not_public(channel: grpc.aio.Channel, world):
    serving = serving_pb2_grpc.ServingServiceStub(channel)
    parent = f"projects/{world.project}"
    calls = [
        serving.ResolveModel(serving_pb2.ResolveModelRequest(parent=parent, model=BASE), metadata=_key(world.api_key)),
        worker_pb2_grpc.WorkerServiceStub(channel).GetAssignment(worker_pb2.GetAssignmentRequest(), metadata=_key(world.api_key)),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in serving.WatchAliases(serving_pb2.WatchAliasesRequest(parent=parent), metadata=_key(world.api_key)):
            pass
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert world.serving.resolved == []


async def test_datasets_are_public_too(channel: grpc.aio.Channel, world):
    spec = dataset_pb2.DatasetSpec(file="file-" + "0" * 24, base_model=BASE)
    request = dataset_pb2.CreateDatasetRequest(parent=f"projects/{world.project}", spec=spec, request_id="r")
    made = await dataset_pb2_grpc.DatasetServiceStub(channel).CreateDataset(request, metadata=_key(world.api_key))
    assert made.name.startswith(f"projects/{world.project}/datasets/")


async def test_health_and_reflection_need_no_key(channel: grpc.aio.Channel):
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {"finery.training.v1.TrainingService", "finery.dataset.v1.DatasetService"} <= names
    assert "finery.training.v1.WorkerService" not in names
    call.cancel()
