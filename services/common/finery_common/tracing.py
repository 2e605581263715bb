"""Traces by OpenTelemetry, off unless FINERY_OTLP_ENDPOINT names a collector.

Owns what services know of it: `span`, and the `traceparent` (W3C Trace Context) that goes along on every wire, in gRPC metadata, in HTTP
headers, and in the rows of jobs and rollouts, whose work goes on after the request. While it is off, nothing of OpenTelemetry is
imported and a span costs a comparison. What a span is called stands where it begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from finery_common.errors import FailedPreconditionError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

TRACEPARENT = "traceparent"

_tracer: Tracer | None = None


def configure_tracing(service: str, *, endpoint: str) -> None:
    """Sends this process's spans to the OTLP/gRPC collector at `endpoint` (`http://host:4317`); nothing where that is empty.

    A collector that is gone costs spans, never requests. Raises FailedPreconditionError where the packages are missing.
    """
    global _tracer  # noqa: PLW0603  as logging: set once, by the process's start
    if not endpoint:
        return
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
        raise FailedPreconditionError("FINERY_OTLP_ENDPOINT is set, but OpenTelemetry is not installed; install the extra `tracing`.")
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": f"finery-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))))
    _tracer = provider.get_tracer("finery")


def is_tracing() -> bool:
    """Whether spans go anywhere."""
    return _tracer is not None


@contextmanager
def span(name: str, *, parent: str = "", **attributes: str | int) -> Iterator[Span | None]:
    """A span around the block, below `parent` (a traceparent) or else below the span that is open here. None while tracing is off.

    An error that leaves the block is recorded.
    """
    if _tracer is None:
        yield None
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({TRACEPARENT: parent}) if parent else None
    with _tracer.start_as_current_span(name, context=context, attributes=attributes) as opened:
        yield opened


def traceparent() -> str:
    """The span that is open here, as the header says it; empty where there is none."""
    if _tracer is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(TRACEPARENT, "")
