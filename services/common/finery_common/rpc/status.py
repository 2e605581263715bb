"""Errors of the tree as gRPC statuses with `google.rpc` details, and back.

Owns the mapping in both directions. Unknown errors become INTERNAL with a correlation id; the inside goes to the log.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any, cast

import grpc
import grpc.aio
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from finery_common.errors import BY_STATUS, FineryError, InternalError, Violation

_DOMAIN = "finery"
log = structlog.get_logger(__name__)


def to_status(error: FineryError) -> status_pb2.Status:
    """`error` as a google.rpc.Status: ErrorInfo always, BadRequest / RetryInfo / QuotaFailure / PreconditionFailure where they apply."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.code, domain=_DOMAIN, metadata=_metadata(error))]
    if error.violations and error.status == "INVALID_ARGUMENT":
        details.append(error_details_pb2.BadRequest(field_violations=[_field_violation(item) for item in error.violations]))
    if error.status == "FAILED_PRECONDITION":
        failure = error_details_pb2.PreconditionFailure.Violation(type=error.code, subject=error.param or "", description=error.message)
        details.append(error_details_pb2.PreconditionFailure(violations=[failure]))
    if error.status == "RESOURCE_EXHAUSTED":
        quota = error_details_pb2.QuotaFailure.Violation(subject=error.param or "", description=error.message)
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration(nanos=0, seconds=0)
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    code = getattr(grpc.StatusCode, error.status)
    return status_pb2.Status(code=code.value[0], message=error.message, details=[_packed(item) for item in details])


def unknown_error(error: BaseException) -> FineryError:
    """Logs `error` with a fresh correlation id and answers what the caller may see of it."""
    correlation_id = uuid.uuid4().hex[:12]
    log.error("unexpected error", correlation_id=correlation_id, exc_info=error)
    return InternalError(f"Something went wrong on our side; the log has it under correlation id {correlation_id}.")


def from_rpc_error(error: grpc.RpcError) -> FineryError:
    """The FineryError that a failed call means."""
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
    kind = BY_STATUS.get(code.name, InternalError)
    message = (error.details() if isinstance(error, grpc.aio.AioRpcError) else None) or code.name
    info: dict[str, str] = {}
    reason, violations, retry_after_s = None, (), None
    status = _rich_status(error)
    for detail in cast("Any", status.details if status is not None else ()):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            unpacked = error_details_pb2.ErrorInfo.FromString(detail.value)
            reason, info = unpacked.reason, dict(unpacked.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            violations = tuple(_violation(item) for item in error_details_pb2.BadRequest.FromString(detail.value).field_violations)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry_after_s = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToMilliseconds() / 1000
    return kind(message, code=reason, param=info.get("param"), violations=violations, retry_after_s=retry_after_s)


def _metadata(error: FineryError) -> dict[str, str]:
    return {} if error.param is None else {"param": error.param}


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _field_violation(violation: Violation) -> error_details_pb2.BadRequest.FieldViolation:
    line = "" if violation.line is None else f":{violation.line}"
    return error_details_pb2.BadRequest.FieldViolation(field=violation.field + line, description=violation.description)


def _violation(item: error_details_pb2.BadRequest.FieldViolation) -> Violation:
    field, _, line = item.field.rpartition(":")
    return Violation(field, item.description, int(line)) if field and line.isdigit() else Violation(item.field, item.description)


def _rich_status(error: grpc.RpcError) -> status_pb2.Status | None:
    metadata = error.trailing_metadata() if isinstance(error, grpc.aio.AioRpcError) else None
    for key, value in cast("Iterable[tuple[str, str | bytes]]", metadata or ()):
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return None


def abort_arguments(error: FineryError) -> grpc.Status:
    """What `context.abort_with_status` takes."""
    return rpc_status.to_status(to_status(error))
