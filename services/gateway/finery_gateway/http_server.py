"""The HTTP port, and serving an app on it within a process that has more to do."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
from collections.abc import Callable, Iterator
from typing import Literal

import uvicorn
from fastapi import FastAPI

from finery_common.errors import FailedPreconditionError
from finery_common.rpc.server import DRAIN_S

HTTP_DRAIN_S = DRAIN_S - 2
MAX_HEAD_BYTES = 256 * 1024
_BACKLOG = 2048


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
                http=_http_protocol(),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http_protocol() -> type[asyncio.Protocol] | Literal["auto"]:
    """httptools' where it is installed, else uvicorn's choice, h11, which has a bound of its own."""
    try:
        implementation = importlib.import_module("uvicorn.protocols.http.httptools_impl")
    except ImportError:
        return "auto"

    class BoundedHead(implementation.HttpToolsProtocol):
        """Of a request's head httptools keeps whatever comes, before anybody could say who it is from."""

        _is_in_head, _head_bytes = False, 0

        def on_message_begin(self) -> None:
            self._is_in_head, self._head_bytes = True, 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._is_in_head = False
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            was_in_head = self._is_in_head
            super().data_received(data)
            if was_in_head and self._is_in_head:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self.send_400_response(f"The head of a request may have {MAX_HEAD_BYTES} bytes.")

    return BoundedHead


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
