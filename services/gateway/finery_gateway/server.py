"""The public gRPC services: calls are forwarded as bytes to the service that owns them, with the key's project in the inner token.

An allow-list by method decides what is public: whole services, less what only the gateway itself may ask. Statuses and their details come
back unchanged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, cast

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from finery.conversion.v1 import conversion_pb2
from finery.dataset.v1 import dataset_pb2
from finery.serving.v1 import serving_pb2
from finery.training.v1 import training_pb2
from finery_common.rpc.channel import bearer
from finery_common.rpc.server import MAX_MESSAGE_BYTES, UNARY_DEADLINE_S, RpcServer, Servicer
from finery_common.rpc.tokens import Principal, TokenSigner, require_project
from finery_gateway.client import rich_status
from finery_gateway.keys import KeyStore

CALLER = "gateway"
# Routes carry replica tokens; the watch is the gateway's own.
INTERNAL_METHODS = frozenset({"ResolveModel", "WatchAliases"})
_PUBLIC_SERVICES = {
    "dataset": dataset_pb2.DESCRIPTOR.services_by_name["DatasetService"],
    "training": training_pb2.DESCRIPTOR.services_by_name["TrainingService"],
    "conversion": conversion_pb2.DESCRIPTOR.services_by_name["ConversionService"],
    "serving": serving_pb2.DESCRIPTOR.services_by_name["ServingService"],
}


@dataclass(frozen=True)
class Targets:
    """Where each service listens."""

    dataset: str
    training: str
    conversion: str
    serving: str


class PublicRpc:
    """The public gRPC server and its channels to the inner ones."""

    def __init__(self, *, address: str, targets: Targets, keys: KeyStore, signer: TokenSigner) -> None:
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self._channels = {area: grpc.aio.insecure_channel(getattr(targets, area), options=options) for area in _PUBLIC_SERVICES}
        servicers = [
            Servicer(service.full_name, partial(_add, handlers=_Forwarder(self._channels[area], signer=signer).handlers(service)))
            for area, service in _PUBLIC_SERVICES.items()
        ]

        async def authenticate(key: str) -> Principal:
            return Principal(CALLER, await keys.project_of(key))

        self._server = RpcServer(address=address, servicers=servicers, authenticate=authenticate)

    async def start(self) -> int:
        """Listens; answers the port. Raises FailedPreconditionError where the address is taken."""
        return await self._server.start()

    async def stop(self, *, drain_s: float) -> None:
        """Drains, then closes the channels."""
        await self._server.stop(drain_s=drain_s)
        for channel in self._channels.values():
            await channel.close(None)


class _Forwarder:
    """Handlers that pass one service's calls on."""

    def __init__(self, channel: grpc.aio.Channel, *, signer: TokenSigner) -> None:
        self._channel = channel
        self._signer = signer

    def handlers(self, service: ServiceDescriptor) -> Mapping[str, grpc.RpcMethodHandler]:
        """One handler for each public method, by its full name."""
        methods = [method for method in service.methods if method.name not in INTERNAL_METHODS]
        made: dict[str, grpc.RpcMethodHandler] = {}
        for method in methods:
            path = f"/{service.full_name}/{method.name}"
            assert not method.client_streaming, f"{path} streams from the client, which is not forwarded"
            if method.server_streaming:
                made[path] = grpc.unary_stream_rpc_method_handler(self._stream(path))
            else:
                made[path] = grpc.unary_unary_rpc_method_handler(self._unary(path))
        return made

    def _unary(self, path: str) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]:
        call = self._channel.unary_unary(path, request_serializer=None, response_deserializer=None)

        async def forward(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            # None where the caller set no deadline, whatever the type says.
            remaining_s = cast("float | None", context.time_remaining())
            try:
                return await call(request, metadata=self._credentials(), timeout=UNARY_DEADLINE_S if remaining_s is None else remaining_s)
            except grpc.aio.AioRpcError as error:
                await _abort_alike(context, error)

        return forward

    def _stream(self, path: str) -> Callable[[bytes, grpc.aio.ServicerContext], AsyncIterator[bytes]]:
        call = self._channel.unary_stream(path, request_serializer=None, response_deserializer=None)

        async def forward(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            try:
                async for response in call(request, metadata=self._credentials(), timeout=context.time_remaining()):
                    yield response
            except grpc.aio.AioRpcError as error:
                await _abort_alike(context, error)

        return forward

    def _credentials(self) -> tuple[tuple[str, str], ...]:
        return bearer(self._signer.sign(Principal(CALLER, require_project())))


class _GenericHandler(grpc.GenericRpcHandler):
    def __init__(self, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)


def _add(server: grpc.aio.Server, *, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
    server.add_generic_rpc_handlers((_GenericHandler(handlers),))


async def _abort_alike(context: grpc.aio.ServicerContext, error: grpc.aio.AioRpcError) -> NoReturn:
    """Ends the call as the inner one ended. A service that cannot be reached shows no address."""
    details = error.details() or ""
    status = rich_status(error)
    trailing = () if status is None else (("grpc-status-details-bin", status),)
    if error.code() is grpc.StatusCode.UNAVAILABLE and not trailing:
        details = "The service cannot be reached at the moment; try again in a few seconds."
    await context.abort(error.code(), details, trailing)
    raise AssertionError("abort raises")
