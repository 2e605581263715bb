"""Metrics of the training service. A running job's gauges go away when it ends."""

from prometheus_client import Counter, Gauge, Histogram

TOKENS_PER_SECOND = Gauge("finery_trainer_tokens_per_second", "Tokens trained per second at the last step.", ["job_id"])
LOSS = Gauge("finery_trainer_loss", "Training loss of the last step.", ["job_id"])
MEMORY_BYTES = Gauge("finery_trainer_memory_bytes", "Peak VRAM of the worker on a GPU, its resident set on a CPU.", ["job_id"])
STEP_SECONDS = Histogram(
    "finery_trainer_step_seconds", "Time between two reported steps.", buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180)
)
JOBS = Gauge("finery_trainer_jobs", "Jobs by state.", ["state"])
QUEUE_SECONDS = Histogram(
    "finery_trainer_queue_seconds", "Time from a job's creation to its first RUNNING.", buckets=(1, 5, 15, 60, 300, 1800, 7200, 86400)
)
LOST_ATTEMPTS = Counter("finery_trainer_lost_attempts_total", "Workers that died or fell silent.")

_OF_JOB = (TOKENS_PER_SECOND, LOSS, MEMORY_BYTES)


def forget_job(job_id: str) -> None:
    """Drops the gauges of a job that no longer runs."""
    for gauge in _OF_JOB:
        gauge.remove_by_labels({"job_id": job_id})
