"""The gateway's metrics."""

from prometheus_client import Counter, Gauge, Histogram

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
RETRIED = Counter("finery_gateway_upstream_retries_total", "Inference requests sent a second time, by cause.", ["cause"])
RATE_LIMITED = Counter(
    "finery_gateway_rate_limited_total", "Requests refused by a limit of their key: requests, tokens or streams.", ["limit"]
)
STREAMS = Gauge("finery_gateway_open_generations", "Inference requests being answered now.")
