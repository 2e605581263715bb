"""FineryError as OpenAI's error envelope: the one place where a REST error gets its status, its type and its headers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from finery_common.errors import (
    FineryError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
    Violation,
)
from finery_common.rpc.status import unknown_error
from finery_common.spec import place_of, plain_words

DEFAULT_RETRY_AFTER_S = 1.0
_NOT_REPEATED = {409, 504, 507}
# What pydantic puts between field names: the member of a union that it tried.
_FIELD = re.compile(r"(?!(?:str|int|float|bool|none|dict|list|tuple|literal)$)[a-z0-9_$]+")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class PayloadTooLargeError(ResourceExhaustedError):
    """A body over its limit."""

    http_status = 413
    default_code = "request_too_large"


class RateLimitedError(ResourceExhaustedError):
    """A limit of the caller's key. `limit` is what there was too much of: requests, tokens or streams."""

    default_code = "rate_limit_exceeded"

    def __init__(self, message: str, *, limit: str, retry_after_s: float | None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit


class MethodNotAllowedError(InvalidArgumentError):
    """A known path, asked with the wrong method."""

    http_status = 405
    default_code = "method_not_allowed"


def envelope(error: FineryError) -> dict[str, object]:
    """`{"error": {message, type, param, code}}`, and `violations` where single inputs are at fault."""
    status = http_status(error)
    body: dict[str, object] = {
        "message": error.message,
        "type": _type(error, status=status),
        "param": error.param,
        "code": error.code,
    }
    if error.violations:
        body["violations"] = [{"field": item.field, "description": item.description, "line": item.line} for item in error.violations]
    return {"error": body}


def _type(error: FineryError, *, status: int) -> str:
    # As OpenAI has it: the limit that is in the way.
    if isinstance(error, RateLimitedError):
        return error.limit
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def http_status(error: FineryError) -> int:
    """What is known and not offered is the request's fault: 400, as OpenAI answers it. A full disk is no rate limit: 507."""
    if error.code == "disk_full":
        return 507
    return 400 if isinstance(error, UnimplementedError) else error.http_status


def error_response(error: FineryError) -> JSONResponse:
    """The envelope with its status. 503 always says when to come back; what repeating cannot help tells the `openai` client so."""
    status = http_status(error)
    headers: dict[str, str] = {}
    if error.retry_after_s is not None or isinstance(error, UnavailableError):
        wait_s = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["retry-after"] = str(max(1, math.ceil(wait_s)))
    never_fits = isinstance(error, RateLimitedError) and error.retry_after_s is None
    if status in _NOT_REPEATED or never_fits:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(envelope(error), status_code=status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Every error of `app` leaves as the envelope."""
    app.add_exception_handler(FineryError, _on_finery_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_unknown_error)


def invalid_body(items: Iterable[dict[str, Any]]) -> InvalidArgumentError:
    """FastAPI's report on a body or a query as one error that names every field."""
    violations = tuple(_violation(item) for item in items)
    text = "; ".join(f"{v.field}: {v.description}" if v.field else v.description for v in violations)
    return InvalidArgumentError(text, param=violations[0].field or None, violations=violations)


async def _on_finery_error(_request: Request, error: Exception) -> Response:
    return error_response(cast("FineryError", error))


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    return error_response(invalid_body(cast("RequestValidationError", error).errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    # FastAPI wraps what reading the body raised, such as the limit's error.
    if isinstance(error.__cause__, FineryError):
        return error_response(error.__cause__)
    status = cast("HTTPException", error).status_code
    if status == 404:
        return error_response(NotFoundError(f"There is no {request.url.path}; /docs lists every path.", code="unknown_url"))
    if status == 405:
        return error_response(MethodNotAllowedError(f"{request.url.path} does not take {request.method}; /docs lists every path."))
    return error_response(InvalidArgumentError("The body could not be read; send valid JSON with content-type application/json."))


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    # Nobody is there to read it; 499 is for the metrics.
    return Response(status_code=499)


async def _on_unknown_error(_request: Request, error: Exception) -> Response:
    return error_response(unknown_error(error))


def _violation(item: dict[str, Any]) -> Violation:
    location = place_of(item)
    if location and location[0] in ("body", "query", "path", "header"):
        location = location[1:]
    # The first is the caller's own word, whatever it looks like.
    field = ".".join(part for number, part in enumerate(location) if not number or _FIELD.fullmatch(part))
    if item["type"] == "json_invalid":
        return Violation("", "the body is not JSON; send valid JSON with content-type application/json")
    if item["type"] == "extra_forbidden":
        return Violation(field, "unknown field; /docs lists the known ones")
    if item["type"] == "missing":
        return Violation(field, "missing; it is required")
    got = "" if item["type"] in ("value_error", "conflict") else f"got {_short(item.get('input'))}, "
    return Violation(field, got + plain_words(str(item["msg"])))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
