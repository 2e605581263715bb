"""Calling another service: a channel that signs each call, gives it a deadline and raises FineryError.

channel = ServiceChannel("127.0.0.1:7001", signer=signer, caller="gateway")
stub = TrainingServiceStub(channel.grpc)
job = await stub.GetJob(request, metadata=channel.metadata(project="p"))
async for event in stream(stub.WatchJob(request, metadata=channel.metadata(project="p"))): ...
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, cast

import grpc
import grpc.aio

from finery_common.rpc.server import MAX_MESSAGE_BYTES
from finery_common.rpc.status import from_rpc_error
from finery_common.rpc.tokens import METADATA_KEY, Principal, TokenSigner
from finery_common.tracing import TRACEPARENT, traceparent

DEFAULT_DEADLINE_S = 30.0
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
# Of several agents any may be asked. For a single address it would be worse: a call to one that is just back fails instead of connecting.
_SEVERAL = [("grpc.lb_policy_name", "round_robin")]

T = TypeVar("T")


class ServiceChannel:
    """A channel to one service, at one address or several, which take turns: `ipv4:host:port,host:port`, or all that a name stands for,
    `dns:///name:port`.

    Unary calls without a deadline get 30 s; errors arrive as FineryError.
    """

    def __init__(self, target: str, *, signer: TokenSigner, caller: str) -> None:
        options = [*_OPTIONS, *(_SEVERAL if "," in target or target.startswith("dns:///") else [])]
        self.grpc = grpc.aio.insecure_channel(target, options=options, interceptors=_interceptors())
        self._signer = signer
        self._caller = caller

    def metadata(self, *, project: str = "") -> tuple[tuple[str, str], ...]:
        """Credentials for one call on behalf of `project`; without one, the service acts for itself. And the trace that is open here."""
        trace = traceparent()
        return bearer(self._signer.sign(Principal(self._caller, project))) + (((TRACEPARENT, trace),) if trace else ())

    async def close(self) -> None:
        """Ends the connection and what is under way on it."""
        await self.grpc.close(None)


def worker_channel(target: str) -> grpc.aio.Channel:
    """A channel for a worker, which has a token of its own and passes `bearer(token)`; errors arrive as FineryError."""
    return grpc.aio.insecure_channel(target, options=_OPTIONS, interceptors=_interceptors())


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that carries `token`."""
    return ((METADATA_KEY, f"Bearer {token}"),)


async def stream(call: AsyncIterable[T]) -> AsyncIterator[T]:
    """The responses of a server stream; raises FineryError where the stream fails."""
    try:
        async for response in call:
            yield response
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def _interceptors() -> list[grpc.aio.ClientInterceptor]:
    return [cast("grpc.aio.ClientInterceptor", _UnaryInterceptor())]


class _UnaryInterceptor(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        if client_call_details.timeout is None:
            client_call_details = client_call_details._replace(timeout=DEFAULT_DEADLINE_S)  # pyright: ignore[reportAttributeAccessIssue]  a named tuple, which the stubs omit
        try:
            return await (await continuation(client_call_details, request))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
