"""The HTTP port, and serving an app on it within a process that has more to do."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI

from finery_common.errors import FailedPreconditionError
from finery_common.rpc.server import DRAIN_S

HTTP_DRAIN_S = DRAIN_S - 2
MAX_HEAD_BYTES = 256 * 1024
MIN_TAKEN_BYTES, TAKEN_WITHIN_S = 32 * 1024, 60.0
"""A client for whom more than this waits takes as much within this time, or is cut."""
_BACKLOG = 2048

log = structlog.get_logger(__name__)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: one place decides when everything of the process stops."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(HTTP_DRAIN_S),
                http=http_protocol(),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_protocol() -> type[asyncio.Protocol]:
    """httptools' where it is installed, else h11's; with bounds on what a client sends as a head, and on how long it may not read."""
    try:
        implementation = importlib.import_module("uvicorn.protocols.http.httptools_impl").HttpToolsProtocol
    except ImportError:
        # It has a bound of its own on heads.
        return _reading(importlib.import_module("uvicorn.protocols.http.h11_impl").H11Protocol)

    class BoundedHead(_reading(implementation)):
        """httptools keeps whatever comes as a request's head, or as headers behind a body in chunks, before anybody could say who it is
        from. Those behind the body nobody here reads.
        """

        _is_in_head, _has_moved, _head_bytes = False, False, 0

        def on_message_begin(self) -> None:
            self._is_in_head = True
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._is_in_head:
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._is_in_head, self._has_moved = False, True
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._has_moved = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._has_moved = True
            super().on_message_complete()

        def data_received(self, data: bytes) -> None:
            self._has_moved = False
            super().data_received(data)
            self._head_bytes = 0 if self._has_moved else self._head_bytes + len(data)
            if self._head_bytes > MAX_HEAD_BYTES and self._is_in_head:
                self.send_400_response(f"The head of a request may have {MAX_HEAD_BYTES} bytes.")
            elif self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

    return BoundedHead


def _reading(implementation: Any) -> Any:
    """A protocol whose client reads: without it, one that does not holds its answer open, and with it the version that gives it."""

    class Reading(implementation):
        _check: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._check_later()

        def resume_writing(self) -> None:
            self._stop_checking()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_checking()
            super().connection_lost(exc)

        def _check_later(self) -> None:
            waiting_bytes = self.transport.get_write_buffer_size()
            self._check = self.loop.call_later(TAKEN_WITHIN_S, self._check_taken, waiting_bytes)

        def _stop_checking(self) -> None:
            if self._check is not None:
                self._check.cancel()

        def _check_taken(self, before_bytes: int) -> None:
            if before_bytes - self.transport.get_write_buffer_size() >= MIN_TAKEN_BYTES:
                self._check_later()
                return
            log.info("cut a client that does not read", within_s=TAKEN_WITHIN_S)
            self.transport.abort()

    return Reading


def listen(host: str, port: int) -> socket.socket:
    """Takes the HTTP port, before anything else is started. Raises FailedPreconditionError where it is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # From here on connections wait: for a start, and for a worker that is started again.
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise FailedPreconditionError(f"FINERY_HTTP_PORT: cannot listen on {host}:{port}: {error.strerror}; choose a free port.") from error
    return listener


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed: it has no build for some platforms, and asyncio's own does the same at more cost."""
    try:
        return importlib.import_module("uvloop").new_event_loop
    except ImportError:
        return None
