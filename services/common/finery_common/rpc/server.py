"""Running a gRPC service: one interceptor for authentication, errors, deadlines and metrics, health, reflection, drain.

Owns the server's life. Servicers only translate, call and translate back: they raise FineryError and never touch the status.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from finery_common.errors import DeadlineExceededError, FailedPreconditionError, FineryError, UnauthenticatedError
from finery_common.rpc.metrics import RPC_REQUESTS, RPC_SECONDS
from finery_common.rpc.status import abort_arguments, unknown_error
from finery_common.rpc.tokens import METADATA_KEY, Principal, TokenSigner, set_principal
from finery_common.tracing import TRACEPARENT, span

DRAIN_S = 20.0
UNARY_DEADLINE_S = 60.0
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Clients ping every 30 s; by gRPC's own limit of 5 minutes a quiet watch would be ended.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]
_OPEN_SERVICES = ("/grpc.health.v1.", "/grpc.reflection.")

Authenticate = Callable[[str], Awaitable[Principal]]
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Servicer:
    """One service of a server: its full proto name and how it is added, such as `partial(add_XServicer_to_server, servicer)`."""

    full_name: str
    add: Callable[[grpc.aio.Server], None]


def token_authenticator(signer: TokenSigner) -> Authenticate:
    """Authenticates by the installation's short-lived tokens."""

    async def authenticate(token: str) -> Principal:
        return signer.read(token)

    return authenticate


class RpcServer:
    """A server of several services. `start()`, and `stop()` to drain."""

    def __init__(self, *, address: str, servicers: Sequence[Servicer], authenticate: Authenticate) -> None:
        self._servicers = tuple(servicers)
        self._address = address
        self._health_names = ["", *(item.full_name for item in self._servicers)]
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]  missing in the stubs
        self._server = grpc.aio.server(
            interceptors=[_Interceptor(authenticate)],
            options=_OPTIONS,
        )
        for servicer in self._servicers:
            servicer.add(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [item.full_name for item in self._servicers]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    async def start(self) -> int:
        """Listens and turns healthy; answers the port. Raises FailedPreconditionError where the address is taken."""
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise FailedPreconditionError(
                f"FINERY_GRPC_ADDRESS: cannot listen on {self._address}; is the port taken? Choose a free one."
            ) from error
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        log.info("serving gRPC", port=port, services=[item.full_name for item in self._servicers])
        return port

    async def set_health(self, name: str, *, is_serving: bool) -> None:
        """Answers for one more name of the health protocol, until the server stops."""
        if name not in self._health_names:
            self._health_names.append(name)
        status = health_pb2.HealthCheckResponse
        await self._health.set(name, status.SERVING if is_serving else status.NOT_SERVING)

    async def stop(self, *, drain_s: float = DRAIN_S) -> None:
        """Turns unhealthy, takes no new request, gives running ones `drain_s` seconds."""
        log.info("draining", drain_s=drain_s)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(drain_s)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in self._health_names:
            await self._health.set(name, status)


class _Interceptor(grpc.aio.ServerInterceptor):
    def __init__(self, authenticate: Authenticate) -> None:
        self._authenticate = authenticate

    async def intercept_service(  # pyright: ignore[reportIncompatibleMethodOverride]  the stubs know the synchronous form only
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN_SERVICES):
            return handler
        token = _bearer(handler_call_details)
        inner: Any
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
            behavior = self._streaming(inner, method=method, token=token)
        else:
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
            make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
            behavior = self._unary(inner, method=method, token=token, parent=_value(handler_call_details, TRACEPARENT) or "")
        return make(behavior, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer)

    def _unary(self, inner: Callable[..., Awaitable[Any]], *, method: str, token: str | None, parent: str) -> Callable[..., Awaitable[Any]]:
        async def behavior(request: Any, context: grpc.aio.ServicerContext) -> Any:
            started_s = time.perf_counter()
            try:
                await self._bind(token)
                # Polls and reports belong to no trace; whatever does says so.
                traced = span(method, parent=parent) if parent else nullcontext()
                with traced:
                    async with asyncio.timeout(UNARY_DEADLINE_S if cast("float | None", context.time_remaining()) is None else None):
                        response = await inner(request, context)
            except Exception as error:  # noqa: BLE001  the one place where unknown errors are caught
                await _abort(context, error, method=method, started_s=started_s)
            _count(method, "OK", started_s)
            return response

        return behavior

    def _streaming(self, inner: Callable[..., AsyncIterator[Any]], *, method: str, token: str | None) -> Callable[..., AsyncIterator[Any]]:
        async def behavior(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            started_s = time.perf_counter()
            try:
                await self._bind(token)
                async for response in inner(request, context):
                    yield response
            except Exception as error:  # noqa: BLE001  the one place where unknown errors are caught
                await _abort(context, error, method=method, started_s=started_s)
            _count(method, "OK", started_s)

        return behavior

    async def _bind(self, token: str | None) -> None:
        if token is None:
            raise UnauthenticatedError("No credentials; send `authorization: Bearer <token>`.")
        set_principal(await self._authenticate(token))


def _bearer(details: grpc.HandlerCallDetails) -> str | None:
    value = _value(details, METADATA_KEY)
    return value[7:].strip() if value is not None and value.lower().startswith("bearer ") else None


def _value(details: grpc.HandlerCallDetails, name: str) -> str | None:
    return next((value for key, value in details.invocation_metadata or () if key == name and isinstance(value, str)), None)


async def _abort(context: grpc.aio.ServicerContext, error: Exception, *, method: str, started_s: float) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, TimeoutError):
        error = DeadlineExceededError(f"{method} was not done within {UNARY_DEADLINE_S:.0f} s; set a longer deadline or try again later.")
    known = error if isinstance(error, FineryError) else unknown_error(error)
    _count(method, known.status, started_s)
    await context.abort_with_status(abort_arguments(known))  # pyright: ignore[reportAttributeAccessIssue]  missing in the stubs
    raise AssertionError("abort_with_status raises")


def _count(method: str, code: str, started_s: float) -> None:
    RPC_REQUESTS.labels(method, code).inc()
    RPC_SECONDS.labels(method).observe(time.perf_counter() - started_s)
