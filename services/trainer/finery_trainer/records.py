"""What the training service keeps of a job, typed: request, step metrics, checkpoints, deployment.

Owns the form of `spec`, `result` and `progress` in the job store; the store's own fields are `finery_common.jobs`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, cast

from finery_common.artifacts import ArtifactRef
from finery_common.jobs import Job, JobState
from finery_common.resource_names import model_alias
from finery_common.spec import MethodType, TrainingSpec
from finery_common.tracing import TRACEPARENT

AWAITING_BASE = "waiting for the base model"
"""A worker's phase, which has a limit of its own."""


class DeploymentState(StrEnum):
    NONE = "NONE"
    PENDING = "PENDING"
    READY = "READY"
    FAILED = "FAILED"


@dataclass(frozen=True)
class JobRequest:
    """What the caller of CreateJob decided. `deploy` None means: where its base model is served."""

    training_file: str
    validation_file: str | None
    spec: TrainingSpec
    suffix: str
    deploy: bool | None

    def to_fields(self) -> dict[str, object]:
        """As the job store keeps it."""
        return {
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "spec": self.spec.model_dump(mode="json"),
            "suffix": self.suffix,
            "deploy": self.deploy,
        }


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step as the wire has it."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    num_trained_tokens: int
    memory_bytes: int
    validation_loss: float | None = None
    data_wait_seconds: float | None = None
    mfu: float | None = None
    memory_allocated_bytes: int | None = None
    memory_reserved_bytes: int | None = None

    def to_fields(self) -> dict[str, Any]:
        """As the job store keeps it: without what is not there."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> StepMetrics:
        """The inverse of `to_fields`."""
        return cls(**fields)


@dataclass(frozen=True)
class Deployment:
    """The deployment step of a job."""

    state: DeploymentState
    alias: str = ""
    message: str = ""


@dataclass(frozen=True)
class CheckpointReport:
    """A full state, and at an epoch's end an adapter, that a worker has published after `step`."""

    step: int
    state: ArtifactRef | None
    adapter: ArtifactRef | None
    metrics: StepMetrics


def request_of(job: Job) -> JobRequest:
    """What the job was created with."""
    fields = cast("dict[str, Any]", job.spec)
    return JobRequest(
        fields["training_file"], fields["validation_file"], TrainingSpec.parse(fields["spec"]), fields["suffix"], fields["deploy"]
    )


def artifact_of(job: Job, key: str) -> ArtifactRef | None:
    """The reference kept in the job's result under `key`."""
    fields = job.result.get(key)
    return None if fields is None else ArtifactRef.model_validate(fields)


def text_of(job: Job, key: str) -> str:
    """The text kept in the job's result under `key`, or nothing."""
    return str(job.result.get(key) or "")


def traceparent_of(job: Job) -> str:
    """The trace that the job's creation belonged to, or nothing."""
    return str(job.progress.get(TRACEPARENT) or "")


def metrics_of(job: Job) -> StepMetrics | None:
    """The last reported step."""
    fields = job.progress.get("metrics")
    return None if fields is None else StepMetrics.from_fields(cast("dict[str, Any]", fields))


def alias_of(job: Job, *, checkpoint_step: int | None = None) -> str:
    """The public name of the job's model, or of the checkpoint of one of its epochs."""
    request = request_of(job)
    return model_alias(
        base_model=request.spec.base_model, project=job.project, suffix=request.suffix, job_id=job.id, checkpoint_step=checkpoint_step
    )


def deployment_of(job: Job) -> Deployment:
    """How far the deployment step is; before the job has succeeded, what it will begin as. Nothing is deployed of a failed job."""
    if job.state in (JobState.FAILED, JobState.CANCELLED):
        return Deployment(DeploymentState.NONE)
    state = job.result.get("deployment_state")
    if state is None:
        request = request_of(job)
        wanted = request.deploy is not False and request.spec.method is not MethodType.FULL
        return Deployment(DeploymentState.PENDING, alias_of(job)) if wanted else Deployment(DeploymentState.NONE)
    if state == DeploymentState.NONE:
        return Deployment(DeploymentState.NONE, message=text_of(job, "deployment_message"))
    return Deployment(DeploymentState(str(state)), alias_of(job), text_of(job, "deployment_message"))


def is_settled(job: Job) -> bool:
    """Nothing of the job will change by itself: it is final and so is its deployment."""
    return job.state.is_final and job.result.get("deployment_state") != DeploymentState.PENDING


def pace_after(job: Job, metrics: StepMetrics, *, epoch: int, now: datetime) -> dict[str, object]:
    """Seconds per step, smoothed over the steps that attempt `epoch` reported, with what the next one needs to go on."""
    before = cast("dict[str, Any]", job.progress.get("pace") or {})
    seconds: float | None = before.get("seconds_per_step")
    if before.get("epoch") == epoch and metrics.step > before["step"]:
        latest = (now - datetime.fromisoformat(before["at"])).total_seconds() / (metrics.step - before["step"])
        seconds = latest if seconds is None else 0.7 * seconds + 0.3 * latest
    return {"epoch": epoch, "step": metrics.step, "at": now.isoformat(), "seconds_per_step": seconds}


def last_progress_of(job: Job, *, now: datetime) -> datetime:
    """When the running job's attempt did its last step, or when the job last changed where it has done none.

    A worker that waits for its base model is not stalled: that is `now`.
    """
    if job.progress.get("phase") == {"phase": AWAITING_BASE, "epoch": job.epoch}:
        return now
    pace = cast("dict[str, Any]", job.progress.get("pace") or {})
    return datetime.fromisoformat(pace["at"]) if pace.get("epoch") == job.epoch else job.updated_at


def has_called(job: Job) -> bool:
    """Whether the attempt's worker has told a phase or a step, so that it runs, whatever else is known of it."""
    return any(cast("dict[str, Any]", job.progress.get(key) or {}).get("epoch") == job.epoch for key in ("phase", "pace"))


def waiting_since(job: Job) -> datetime:
    """Since when the job waits for a worker that runs. Attempts that did not come to that change nothing."""
    mark = cast("dict[str, Any]", job.progress.get("waits") or {})
    return datetime.fromisoformat(mark["since"]) if mark.get("epoch") == job.epoch and not has_called(job) else job.updated_at


def waits(job: Job, *, epoch: int) -> dict[str, object]:
    """What has the job's progress remember, in attempt `epoch`, since when it waits."""
    return {"waits": {"since": waiting_since(job).isoformat(), "epoch": epoch}}


def estimated_finish_of(job: Job) -> datetime | None:
    """From the measured pace; None before there is one."""
    pace, metrics = cast("dict[str, Any]", job.progress.get("pace") or {}), metrics_of(job)
    if metrics is None or pace.get("seconds_per_step") is None:
        return None
    return datetime.fromisoformat(pace["at"]) + timedelta(seconds=pace["seconds_per_step"] * (metrics.num_steps - metrics.step))
