"""Settings of the training service and of a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

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
    launcher: Literal["local", "kubernetes"] = "local"
    """Where workers run: as processes of this machine, or as Jobs of a cluster."""
    kubernetes_namespace: str = ""
    """Of the workers' Jobs; empty for the pod's own."""
    kubernetes_job_template: Path = Path("/etc/finery/worker-job.yaml")
    """YAML of a whole batch/v1 Job with a container `worker`."""
    kubernetes_gpu_resource: str = "nvidia.com/gpu"
    """What a GPU is called in a container's limits; empty where workers get none, or their devices by resource claims."""
    kubernetes_max_gpus: int = Field(default=8, ge=1)
    """GPUs of the largest node that takes workers. A job trains on one node, so more are refused."""


class WorkerSettings(ServiceSettings):
    """What one attempt's worker needs. The launcher sets it."""

    worker_token_file: Path
    """File or inherited descriptor (`/dev/fd/<n>`) that holds the attempt's token; read once."""
    worker_heartbeat_s: float = Field(default=5.0, gt=0)
    """Time between heartbeats."""
    worker_tolerance_s: float = Field(default=300.0, gt=0)
    """How long training goes on while the server cannot be reached."""
    worker_base_wait_s: float = Field(default=0.0, ge=0)
    """How long the folder of a base model may not be there yet, where another process brings it."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads that compute on a CPU; none: `OMP_NUM_THREADS`, or as many as the worker may use CPUs."""
    metrics_target_file: Path | None = None
    """Where the worker tells Prometheus of its `/metrics`; whoever set it removes it."""
