"""What happens around every HTTP request: the limit on its body, its metrics, and its span. Plain ASGI, so that streams pass untouched."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finery_common.tracing import TRACEPARENT, span
from finery_gateway.errors import PayloadTooLargeError, error_response
from finery_gateway.metrics import HTTP_REQUESTS, HTTP_SECONDS

UPLOAD_PATH = "/v1/files"
# What a multipart body has around the file.
FORM_SLACK_BYTES = 64 * 1024
PROBES = ("/healthz", "/readyz")


class BodyLimit:
    """Answers 413 to a body over its limit: at once where the length is announced, else when it is reached."""

    def __init__(self, app: ASGIApp, *, body_limit_bytes: int, upload_limit_bytes: int) -> None:
        self._app = app
        self._body_limit_bytes = body_limit_bytes
        self._upload_limit_bytes = upload_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"] == UPLOAD_PATH
        limit_bytes = self._upload_limit_bytes + FORM_SLACK_BYTES if is_upload else self._body_limit_bytes
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced) > limit_bytes:
            await error_response(self._error(is_upload=is_upload, got=f"{int(announced)} bytes"))(scope, receive, send)
            return
        size_bytes = 0

        async def counted() -> Message:
            nonlocal size_bytes
            message = await receive()
            size_bytes += len(message.get("body", b""))
            if size_bytes > limit_bytes:
                raise self._error(is_upload=is_upload, got="more")
            return message

        await self._app(scope, counted, send)

    def _error(self, *, is_upload: bool, got: str) -> PayloadTooLargeError:
        limit_bytes = self._upload_limit_bytes if is_upload else self._body_limit_bytes
        what, variable = ("file", "FINERY_UPLOAD_LIMIT_BYTES") if is_upload else ("body", "FINERY_BODY_LIMIT_BYTES")
        return PayloadTooLargeError(f"{what}: got {got}, wanted at most {limit_bytes} bytes; send less or raise {variable}.", param=what)


class RequestMetrics:
    """Counts and times every request by its route's template, never by its path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            project = scope.get("state", {}).get("project", "")
            # 499: the client left before an answer began.
            HTTP_REQUESTS.labels(route, scope["method"], str(status or 499), project).inc()
            HTTP_SECONDS.labels(route, scope["method"]).observe(time.perf_counter() - started_s)


class RequestSpans:
    """A span around every request, below the caller's own where it sends a `traceparent`. Probes have none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == TRACEPARENT.encode()), b"")
        with span(scope["method"], parent=given.decode("latin-1")) as opened:
            assert opened is not None, "the middleware is there while tracing is on"
            has_begun = False

            async def noted(message: Message) -> None:
                nonlocal has_begun
                if message["type"] == "http.response.start":
                    opened.set_attribute("http.response.status_code", message["status"])
                elif message.get("body") and not has_begun:
                    has_begun = True
                    opened.add_event("first byte")
                await send(message)

            try:
                await self._app(scope, receive, noted)
            finally:
                # The route's template, which is known only now.
                opened.update_name(f"{scope['method']} {getattr(scope.get('route'), 'path', 'none')}")
