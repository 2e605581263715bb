"""Metrics of dataprep."""

from prometheus_client import Counter, Gauge, Histogram

ROWS = Counter("finery_dataprep_rows_total", "Lines of training files read.")
BAD_ROWS = Counter("finery_dataprep_bad_rows_total", "Lines that could not be used.")
TOKENS = Counter("finery_dataprep_tokens_total", "Tokens written.")
SECONDS = Histogram(
    "finery_dataprep_seconds", "Time from a dataset's start to its end.", ["state"], buckets=(0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200)
)
JOBS = Gauge("finery_dataprep_jobs", "Datasets by state.", ["state"])
QUEUE_SECONDS = Histogram("finery_dataprep_queue_seconds", "Time from creation to the first attempt.", buckets=(0.1, 1, 10, 60, 600, 3600))
