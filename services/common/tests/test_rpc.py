"""The RPC library against a real server on loopback."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from functools import partial

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from finery.common.v1 import job_pb2
from finery.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from finery_common.errors import InternalError, InvalidArgumentError, NotFoundError, UnauthenticatedError, Violation
from finery_common.rpc.channel import ServiceChannel, stream
from finery_common.rpc.server import RpcServer, Servicer, token_authenticator
from finery_common.rpc.tokens import Principal, TokenSigner, current_principal, require_project

SIGNER = TokenSigner("s" * 40)


class _Datasets(dataset_pb2_grpc.DatasetServiceServicer):
    async def GetDataset(self, request, context):
        if request.name == "bug":
            raise ZeroDivisionError("the inside")
        if request.name == "bad":
            violations = (Violation("training.jsonl", "not JSON", 7), Violation("spec.seed", "got -1"))
            raise InvalidArgumentError("2 fields are wrong", code="bad_rows", param="spec", violations=violations, retry_after_s=1.5)
        return dataset_pb2.Dataset(name=f"{require_project()}/{current_principal().caller}")

    async def WatchDataset(self, request, context):
        yield job_pb2.JobEvent(sequence=1)
        raise NotFoundError("gone")


class _Counted(_Datasets):
    def __init__(self) -> None:
        self.num_calls = 0

    async def GetDataset(self, request, context):
        self.num_calls += 1
        return await super().GetDataset(request, context)


async def _serving(datasets: _Datasets, address: str) -> tuple[RpcServer, int]:
    add = partial(dataset_pb2_grpc.add_DatasetServiceServicer_to_server, datasets)
    servicers = [Servicer("finery.dataset.v1.DatasetService", add)]
    server = RpcServer(address=address, servicers=servicers, authenticate=token_authenticator(SIGNER))
    return server, await server.start()


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server, port = await _serving(_Datasets(), "127.0.0.1:0")
    yield f"127.0.0.1:{port}"
    await server.stop(drain_s=0)


@pytest.fixture
async def channel(address: str) -> AsyncIterator[ServiceChannel]:
    channel = ServiceChannel(address, signer=SIGNER, caller="test")
    yield channel
    await channel.close()


async def test_a_signed_call_reaches_the_servicer_with_its_project(channel: ServiceChannel):
    stub = dataset_pb2_grpc.DatasetServiceStub(channel.grpc)
    answer = await stub.GetDataset(dataset_pb2.GetDatasetRequest(name="x"), metadata=channel.metadata(project="alpha"))
    assert answer.name == "alpha/test"


async def test_a_call_without_or_with_a_foreign_token_is_refused(address: str, channel: ServiceChannel):
    stub = dataset_pb2_grpc.DatasetServiceStub(channel.grpc)
    with pytest.raises(UnauthenticatedError):
        await stub.GetDataset(dataset_pb2.GetDatasetRequest(name="x"))
    foreign = ServiceChannel(address, signer=TokenSigner("t" * 40), caller="test")
    with pytest.raises(UnauthenticatedError):
        await dataset_pb2_grpc.DatasetServiceStub(foreign.grpc).GetDataset(
            dataset_pb2.GetDatasetRequest(name="x"), metadata=foreign.metadata(project="alpha")
        )
    await foreign.close()


def _localhost_is_two_addresses() -> bool:
    """gRPC takes it for both wherever the kernel has IPv6."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as six:
        six.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not _localhost_is_two_addresses(), reason="localhost is one address here")
async def test_all_that_a_name_stands_for_take_turns_and_one_that_does_not_listen_is_passed_over():
    four, six = _Counted(), _Counted()
    server, port = await _serving(four, "127.0.0.1:0")
    other, _ = await _serving(six, f"[::1]:{port}")
    channel = ServiceChannel(f"dns:///localhost:{port}", signer=SIGNER, caller="test")
    stub = dataset_pb2_grpc.DatasetServiceStub(channel.grpc)

    async def ask(times: int) -> None:
        for _ in range(times):
            request = dataset_pb2.GetDatasetRequest(name="x")
            await stub.GetDataset(request, metadata=channel.metadata(project="alpha"), wait_for_ready=True)

    for _ in range(1000):  # the second may connect a little later
        if not (four.num_calls and six.num_calls):
            await ask(1)
    assert four.num_calls
    assert six.num_calls
    await other.stop(drain_s=0)
    before = four.num_calls
    await ask(4)
    assert four.num_calls == before + 4
    await channel.close()
    await server.stop(drain_s=0)


async def test_an_expired_token_is_refused(channel: ServiceChannel):
    expired = SIGNER.sign(Principal("test", "alpha"), ttl_s=-1)
    with pytest.raises(UnauthenticatedError, match="expired"):
        await dataset_pb2_grpc.DatasetServiceStub(channel.grpc).GetDataset(
            dataset_pb2.GetDatasetRequest(name="x"), metadata=(("authorization", f"Bearer {expired}"),)
        )


async def test_an_error_arrives_with_all_its_details(channel: ServiceChannel):
    stub = dataset_pb2_grpc.DatasetServiceStub(channel.grpc)
    with pytest.raises(InvalidArgumentError) as caught:
        await stub.GetDataset(dataset_pb2.GetDatasetRequest(name="bad"), metadata=channel.metadata(project="alpha"))
    error = caught.value
    assert (error.message, error.code, error.param, error.retry_after_s) == ("2 fields are wrong", "bad_rows", "spec", 1.5)
    assert error.violations == (Violation("training.jsonl", "not JSON", 7), Violation("spec.seed", "got -1"))


async def test_a_bug_shows_a_correlation_id_and_nothing_of_the_inside(channel: ServiceChannel):
    stub = dataset_pb2_grpc.DatasetServiceStub(channel.grpc)
    with pytest.raises(InternalError) as caught:
        await stub.GetDataset(dataset_pb2.GetDatasetRequest(name="bug"), metadata=channel.metadata(project="alpha"))
    assert "correlation id" in caught.value.message
    assert "inside" not in caught.value.message


async def test_a_stream_ends_with_its_error(channel: ServiceChannel):
    stub = dataset_pb2_grpc.DatasetServiceStub(channel.grpc)
    events = stream(stub.WatchDataset(dataset_pb2.WatchDatasetRequest(), metadata=channel.metadata(project="alpha")))
    assert (await anext(events)).sequence == 1
    with pytest.raises(NotFoundError, match="gone"):
        await anext(events)


async def test_health_needs_no_credentials(address: str):
    async with grpc.aio.insecure_channel(address) as plain:
        answer = await health_pb2_grpc.HealthStub(plain).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_has_names_of_its_own_until_the_server_stops():
    server = RpcServer(address="127.0.0.1:0", servicers=[], authenticate=token_authenticator(SIGNER))
    port = await server.start()
    status = health_pb2.HealthCheckResponse
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as plain:
        watch = health_pb2_grpc.HealthStub(plain).Watch(health_pb2.HealthCheckRequest(service="vllm"))
        seen = [(await anext(aiter(watch))).status]
        for is_serving in (False, True):
            await server.set_health("vllm", is_serving=is_serving)
            seen.append((await anext(aiter(watch))).status)
        stopping = asyncio.create_task(server.stop(drain_s=5))
        seen.append((await anext(aiter(watch))).status)
        watch.cancel()
        await stopping
    assert seen == [status.SERVICE_UNKNOWN, status.NOT_SERVING, status.SERVING, status.NOT_SERVING]
