"""Logs and metrics of a process: JSON lines on standard error, `/metrics` for Prometheus.

Owns their set-up, which each `__main__` calls once. What is measured is declared in each service's `metrics.py`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from prometheus_client import make_wsgi_app, start_http_server

from finery_common.errors import FailedPreconditionError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


def configure_logging(service: str, *, level: str = "INFO") -> None:
    """Sends structlog and the standard library's loggers to standard error as JSON with `service` bound. `level` is a name."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # At WARNING it logs the URL of a request that it repeats: for a presigned one that is as good as a key.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)


def serve_metrics(*, host: str, port: int) -> int:
    """Serves `/metrics` in a thread; answers the port taken. Raises FailedPreconditionError where `port` is in use."""
    try:
        server, _ = start_http_server(port, addr=host)
    except OSError as error:
        text = f"FINERY_METRICS_PORT: cannot listen on {host}:{port}: {error.strerror}; choose a free port"
        raise FailedPreconditionError(text) from error
    server.set_app(_in_plain_text(make_wsgi_app()))
    return int(server.server_port)


def _in_plain_text(app: WSGIApplication) -> WSGIApplication:
    """`app`, as it answers who prefers no format: prometheus_client's OpenMetrics makes `vllm_…` of the names `vllm:…`."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return app({key: value for key, value in environ.items() if key != "HTTP_ACCEPT"}, start_response)

    return answer


def announce_metrics(file: Path, *, address: str, service: str) -> None:
    """Tells Prometheus, by a file that its file_sd reads, of a process whose port nobody could know before. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps([{"targets": [address], "labels": {"service": service}}]))
    temporary.replace(file)
