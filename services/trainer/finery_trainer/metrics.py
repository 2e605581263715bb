"""Metrics of the training service. A running job's gauges go away when it ends."""

from prometheus_client import Counter, Gauge, Histogram

from finery_trainer.records import StepMetrics

TOKENS_PER_SECOND = Gauge("finery_trainer_tokens_per_second", "Tokens trained per second at the last step.", ["job_id"])
MFU = Gauge(
    "finery_trainer_mfu_ratio", "Model FLOPs utilization of the last step: what the model needs, over what its GPUs could do.", ["job_id"]
)
LOSS = Gauge("finery_trainer_loss", "Training loss of the last step.", ["job_id"])
VALIDATION_LOSS = Gauge("finery_trainer_validation_loss", "Validation loss of the last epoch.", ["job_id"])
GRAD_NORM = Gauge("finery_trainer_grad_norm", "Norm of the last step's gradients, before they were clipped.", ["job_id"])
LEARNING_RATE = Gauge("finery_trainer_learning_rate", "Learning rate of the last step.", ["job_id"])
STEP = Gauge("finery_trainer_step", "The last step.", ["job_id"])
STEPS = Gauge("finery_trainer_steps", "Steps that the job has.", ["job_id"])
SECONDS_PER_STEP = Gauge("finery_trainer_seconds_per_step", "Time between two reported steps, smoothed.", ["job_id"])
DATA_WAIT_SECONDS = Gauge(
    "finery_trainer_data_wait_seconds", "Time of the last step that went into reading and packing rows; a GPU computes beside.", ["job_id"]
)
MEMORY_BYTES = Gauge("finery_trainer_memory_bytes", "Peak VRAM of the worker on a GPU, its resident set on a CPU.", ["job_id"])
MEMORY_ALLOCATED_BYTES = Gauge("finery_trainer_memory_allocated_bytes", "VRAM that tensors held after the last step.", ["job_id"])
MEMORY_RESERVED_BYTES = Gauge(
    "finery_trainer_memory_reserved_bytes", "VRAM that torch held after the last step, free parts included.", ["job_id"]
)
LAST_PROGRESS = Gauge(
    "finery_trainer_last_progress_timestamp_seconds", "When the running job last did a step or began its attempt, since 1970.", ["job_id"]
)
STEP_SECONDS = Histogram(
    "finery_trainer_step_seconds", "Time between two reported steps.", buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180)
)
TOKENS = Counter("finery_trainer_tokens_total", "Tokens trained on, by all jobs; those of steps done again count again.")
JOBS = Gauge("finery_trainer_jobs", "Jobs by state.", ["state"])
QUEUE_SECONDS = Histogram(
    "finery_trainer_queue_seconds", "Time from a job's creation to its first RUNNING.", buckets=(1, 5, 15, 60, 300, 1800, 7200, 86400)
)
OLDEST_QUEUED_SECONDS = Gauge(
    "finery_trainer_oldest_queued_seconds", "How long the job that waits longest has waited for a worker that runs; 0 where none does."
)
LOST_ATTEMPTS = Counter("finery_trainer_lost_attempts_total", "Workers that died or fell silent.")
JOB_FAILURES = Counter("finery_trainer_job_failures_total", "Jobs that failed, by the code of their error.", ["code"])
DEPLOYMENTS = Counter("finery_trainer_deployments_total", "Deployment steps that ended: READY, FAILED, or NONE.", ["state"])
# A counter that first shows as 1 has not risen, as Prometheus sees it.
JOB_FAILURES.labels("non_finite_loss")
DEPLOYMENTS.labels("FAILED")

_OF_STEP = {
    "tokens_per_second": TOKENS_PER_SECOND,
    "mfu": MFU,
    "loss": LOSS,
    "validation_loss": VALIDATION_LOSS,
    "grad_norm": GRAD_NORM,
    "learning_rate": LEARNING_RATE,
    "step": STEP,
    "num_steps": STEPS,
    "data_wait_seconds": DATA_WAIT_SECONDS,
    "memory_bytes": MEMORY_BYTES,
    "memory_allocated_bytes": MEMORY_ALLOCATED_BYTES,
    "memory_reserved_bytes": MEMORY_RESERVED_BYTES,
}
"""By the field of StepMetrics that each shows."""
_OF_JOB = (*_OF_STEP.values(), SECONDS_PER_STEP, LAST_PROGRESS)


def show_step(job_id: str, report: StepMetrics, *, seconds_per_step: float | None, num_new_tokens: int) -> None:
    """What a running job's last step was like. What the step has no value for keeps the one before."""
    for field, value in report.to_fields().items():
        if field in _OF_STEP:
            _OF_STEP[field].labels(job_id).set(value)
    TOKENS.inc(num_new_tokens)
    if seconds_per_step is not None:
        SECONDS_PER_STEP.labels(job_id).set(seconds_per_step)
        STEP_SECONDS.observe(seconds_per_step)


def forget_job(job_id: str) -> None:
    """Drops the gauges of a job that no longer runs."""
    for gauge in _OF_JOB:
        gauge.remove_by_labels({"job_id": job_id})
