"""An OpenTelemetry collector in the test's process: keeps every span that it is sent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """A finished span. Ids are in hexadecimal; `parent` is empty for a root."""

    trace: str
    id: str
    parent: str
    service: str
    name: str
    attributes: frozenset[str]
    """Their names."""


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """`endpoint` is what FINERY_OTLP_ENDPOINT is to be."""

    def __init__(self) -> None:
        self.endpoint = ""
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def Export(self, request, context):
        for resource in request.resource_spans:
            service = next((item.value.string_value for item in resource.resource.attributes if item.key == "service.name"), "")
            found = [_span(service, span) for scope in resource.scope_spans for span in scope.spans]
            with self._lock:
                self._spans += found
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace: str) -> list[Span]:
        with self._lock:
            return [span for span in self._spans if span.trace == trace]


def _span(service, span) -> Span:
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    return Span(*ids, service, span.name, frozenset(item.key for item in span.attributes))


@contextlib.contextmanager
def running_collector() -> Iterator[Collector]:
    """On a free port of the loopback."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(1).wait()
