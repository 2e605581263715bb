"""The gateway's metrics."""

from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

HTTP_REQUESTS = Counter("finery_gateway_requests_total", "Finished HTTP requests.", ["route", "method", "status", "project"])
HTTP_SECONDS = Histogram(
    "finery_gateway_request_seconds",
    "Time from a request's arrival to the last byte of its answer.",
    ["route", "method"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
FIRST_BYTE_SECONDS = Histogram(
    "finery_gateway_first_byte_seconds",
    "Time from an inference request's arrival to the first byte of its answer.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
TOKENS = Counter("finery_gateway_tokens_total", "Tokens of finished requests; kind is prompt or completion.", ["project", "kind"])
UPLOAD_BYTES = Counter("finery_gateway_upload_bytes_total", "Bytes of files published.", ["project"])
RETRIED = Counter("finery_gateway_upstream_retries_total", "Inference requests sent again, by cause.", ["cause"])
RATE_LIMITED = Counter(
    "finery_gateway_rate_limited_total", "Requests refused by a limit of their key: requests, tokens or streams.", ["limit"]
)
STREAMS = Gauge("finery_gateway_open_generations", "Inference requests being answered now.")
_VERSION = ("project", "alias", "version")


def version_families(
    outcomes: Sequence[str],
) -> tuple[CounterMetricFamily, CounterMetricFamily, HistogramMetricFamily, HistogramMetricFamily]:
    """Requests, tokens, times to the first byte and to the last, by version of an alias: for `version_reports` to fill at a scrape.

    Series go away with their version.
    """
    requests = f"Inference requests by the version that answered them, or did not; outcome is {', '.join(outcomes)}."
    return (
        CounterMetricFamily("finery_gateway_version_requests_total", requests, labels=[*_VERSION, "outcome"]),
        CounterMetricFamily(
            "finery_gateway_version_tokens_total", "Tokens by version; kind is prompt or completion.", labels=[*_VERSION, "kind"]
        ),
        HistogramMetricFamily(
            "finery_gateway_version_first_byte_seconds", "Time from a request's arrival to the first byte of its answer.", labels=_VERSION
        ),
        HistogramMetricFamily(
            "finery_gateway_version_request_seconds", "Time from a request's arrival to the last byte of its answer.", labels=_VERSION
        ),
    )
