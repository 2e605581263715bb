"""Metrics of dataprep."""

from prometheus_client import Counter, Gauge, Histogram

ROWS = Counter("finery_dataprep_rows_total", "Lines of training files read.")
BAD_ROWS = Counter("finery_dataprep_bad_rows_total", "Lines that could not be used.")
TOKENS = Counter("finery_dataprep_tokens_total", "Tokens written.")
SECONDS = Histogram(
    "finery_dataprep_seconds", "Time from a dataset's start to its end.", ["state"], buckets=(0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200)
)
JOBS = Gauge("finery_dataprep_jobs", "Datasets by state.", ["state"])
