"""Settings of the training service and of a worker."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from finery_common.settings import ServiceSettings


class TrainerSettings(ServiceSettings):
    """What the training service needs beyond what every service does."""

    max_workers: int = Field(default=1, ge=1)
    """Jobs that train at the same time; the others wait in the order of their creation."""
    lease_s: float = Field(default=30.0, gt=0)
    """A worker that has not reported for so long counts as dead."""
    cancel_grace_s: float = Field(default=60.0, gt=0)
    """A worker that has not obeyed a cancellation for so long is ended."""


class WorkerSettings(ServiceSettings):
    """What one attempt's worker needs. The launcher sets it."""

    worker_token_file: Path
    """File or inherited descriptor (`/dev/fd/<n>`) that holds the attempt's token; read once."""
    worker_heartbeat_s: float = Field(default=5.0, gt=0)
    """Time between heartbeats."""
    worker_tolerance_s: float = Field(default=300.0, gt=0)
    """How long training goes on while the server cannot be reached."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads that compute on a CPU; none: `OMP_NUM_THREADS`, or as many as the worker may use CPUs."""
    metrics_target_file: Path | None = None
    """Where the worker tells Prometheus of its `/metrics`; whoever set it removes it."""
