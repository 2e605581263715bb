"""A line in the log for every HTTP request, and the id that request, answer and log lines share.

The line says who asked for what by which id, how it ended, and how long it took: never what was written or generated, unless
`FINERY_LOG_CONTENT` asks for it. What is known of the key's limits goes out in the answer's headers here as well. Plain ASGI, so that
streams pass untouched.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finery_common.rpc.status import unknown_error
from finery_gateway.admission import Allowance, GenerationRecord
from finery_gateway.errors import error_response
from finery_gateway.middleware import PROBES

MAX_CONTENT_BYTES = 256 * 1024
"""Of each answer, in a log with content."""
_GOOD_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")

log = structlog.get_logger(__name__)


class RequestLog:
    """Gives every request its id, and writes its line when the last byte is out or the client is gone."""

    def __init__(self, app: ASGIApp, *, log_content: bool = False) -> None:
        self._app = app
        self._log_content = log_content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        line = _Line(scope, log_content=self._log_content)

        async def noted(message: Message) -> None:
            line.note(message)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=line.request_id):
            try:
                await self._app(scope, receive, noted)
            except Exception as error:
                if line.status:
                    raise
                # Here and not further out, so that this answer has its id as well.
                await error_response(unknown_error(error))(scope, receive, noted)
            finally:
                line.write()


class _Line:
    """What is gathered of one request."""

    def __init__(self, scope: Scope, *, log_content: bool) -> None:
        self._scope = scope
        self._started_s = time.perf_counter()
        self._first_byte_s: float | None = None
        self._log_content = log_content
        self._content = bytearray()
        self.status = 0
        self._over = False
        self.request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = self.request_id

    def note(self, message: Message) -> None:
        """Reads a message of the answer, and puts the headers into its first one."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            allowance: Allowance | None = self._state.get("allowance")
            limits = allowance.headers() if allowance is not None else []
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode()), *limits]
        elif message["type"] == "http.response.body":
            if self._first_byte_s is None and message.get("body"):
                self._first_byte_s = time.perf_counter() - self._started_s
            self._over = not message.get("more_body", False)
            if self._log_content and len(self._content) < MAX_CONTENT_BYTES:
                self._content += message.get("body", b"")[: MAX_CONTENT_BYTES - len(self._content)]

    def write(self) -> None:
        """The line. A probe's is for debugging only."""
        seconds = time.perf_counter() - self._started_s
        fields: dict[str, object] = {
            "key_id": self._state.get("key_id"),
            "project": self._state.get("project"),
            "method": self._scope["method"],
            "route": getattr(self._scope.get("route"), "path", "none"),
            # 499: the client left before an answer began.
            "status": self.status or 499,
            "first_byte_seconds": None if self._first_byte_s is None else round(self._first_byte_s, 6),
            "seconds": round(seconds, 6),
            "cut_off": None if self._over else True,
            "refused_by": getattr(self._state.get("allowance"), "refused", None),
            **self._generation(),
        }
        write = log.debug if self._scope["path"] in PROBES else log.info
        write("request", **{name: value for name, value in fields.items() if value is not None})

    @property
    def _state(self) -> dict[str, Any]:
        return self._scope["state"]

    def _generation(self) -> dict[str, object]:
        generation = self._state.get("generation")
        if generation is None:
            return {}
        record: GenerationRecord = generation.record
        fields: dict[str, object] = {
            "model": generation.model,
            "version": record.version or None,
            "streams": generation.streams,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
        }
        if self._log_content:
            fields |= {"content_asked": generation.body, "content_answered": self._content.decode(errors="replace")}
        return fields


def _request_id(scope: Scope) -> str:
    """The caller's `x-request-id` where it can stand in a log, else a fresh one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _GOOD_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
