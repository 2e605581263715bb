"""The errors that callers see.

Owns the tree and what each member means. `finery_common.rpc` maps it to gRPC statuses and back, the gateway maps it to
OpenAI's envelope. Every message says what was got, what was wanted and what to do.

    FineryError
    ├── InvalidArgumentError      the request itself is wrong; repeating it cannot help
    ├── UnauthenticatedError      no credentials, or wrong ones
    ├── PermissionDeniedError     known caller, not allowed
    ├── NotFoundError             no such resource in the caller's project
    ├── AlreadyExistsError        the name or request id is taken by something else
    ├── FailedPreconditionError   right request, wrong state
    ├── AbortedError              lost a race: a stale lease epoch or etag
    ├── ResourceExhaustedError    a limit, a quota or a disk is full
    ├── UnavailableError          gone for the moment; repeat later
    ├── DeadlineExceededError     not done in time
    ├── UnimplementedError        known to the API, not offered here
    ├── DataLossError             stored bytes differ from their digest
    └── InternalError             our bug; carries a correlation id and nothing of the inside
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Violation:
    """One wrong input: `field` names the request field or file, `line` counts from 1 inside a file."""

    field: str
    description: str
    line: int | None = None


class FineryError(Exception):
    """Base of every error meant for callers.

    `code` is a stable word for machines; `param` names the request field at fault; `retry_after_s` is in seconds.
    """

    status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s


class InvalidArgumentError(FineryError):
    status = "INVALID_ARGUMENT"
    http_status = 400
    default_code = "invalid_argument"


class UnauthenticatedError(FineryError):
    status = "UNAUTHENTICATED"
    http_status = 401
    default_code = "invalid_api_key"


class PermissionDeniedError(FineryError):
    status = "PERMISSION_DENIED"
    http_status = 403
    default_code = "permission_denied"


class NotFoundError(FineryError):
    status = "NOT_FOUND"
    http_status = 404
    default_code = "not_found"


class AlreadyExistsError(FineryError):
    status = "ALREADY_EXISTS"
    http_status = 409
    default_code = "already_exists"


class FailedPreconditionError(FineryError):
    status = "FAILED_PRECONDITION"
    http_status = 409
    default_code = "failed_precondition"


class AbortedError(FineryError):
    status = "ABORTED"
    http_status = 409
    default_code = "conflict"


class ResourceExhaustedError(FineryError):
    status = "RESOURCE_EXHAUSTED"
    http_status = 429
    default_code = "resource_exhausted"


class UnavailableError(FineryError):
    status = "UNAVAILABLE"
    http_status = 503
    default_code = "unavailable"


class DeadlineExceededError(FineryError):
    status = "DEADLINE_EXCEEDED"
    http_status = 504
    default_code = "deadline_exceeded"


class UnimplementedError(FineryError):
    status = "UNIMPLEMENTED"
    http_status = 501
    default_code = "not_supported"


class DataLossError(FineryError):
    status = "DATA_LOSS"
    http_status = 500
    default_code = "data_loss"


class InternalError(FineryError):
    """Raised on the client's side for a status that names no member of the tree."""


BY_STATUS: dict[str, type[FineryError]] = {
    kind.status: kind
    for kind in (
        InvalidArgumentError,
        UnauthenticatedError,
        PermissionDeniedError,
        NotFoundError,
        AlreadyExistsError,
        FailedPreconditionError,
        AbortedError,
        ResourceExhaustedError,
        UnavailableError,
        DeadlineExceededError,
        UnimplementedError,
        DataLossError,
        InternalError,
    )
}
