"""Metrics of the converter."""

from prometheus_client import Counter, Gauge, Histogram

JOBS = Gauge("finery_converter_jobs", "Conversions by state.", ["state"])
SECONDS = Histogram(
    "finery_converter_seconds",
    "Time from an attempt's start to the conversion's end.",
    ["format", "state"],
    buckets=(5, 10, 30, 60, 300, 1800, 7200),
)
QUEUE_SECONDS = Histogram("finery_converter_queue_seconds", "Time from creation to the first attempt.", buckets=(0.1, 1, 10, 60, 600, 3600))
WORKER_DEATHS = Counter("finery_converter_worker_deaths_total", "Workers that something killed.")
PUBLISHED_BYTES = Counter("finery_converter_published_bytes_total", "Bytes of published models.")
PUSHES = Counter("finery_converter_pushes_total", "Pushes to a Hub by outcome: pushed, failed.", ["outcome"])
