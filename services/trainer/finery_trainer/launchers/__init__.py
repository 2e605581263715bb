"""How a worker process comes to be: `local` as a subprocess of the service. The scheduler knows the protocol alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Attempt:
    """One try at a job, and the token that lets its worker report."""

    job_id: str
    epoch: int
    token: str


@dataclass(frozen=True)
class Exit:
    """A worker that ended. `was_stopped` where it ended because it was told to; `reason` is for people."""

    job_id: str
    epoch: int
    was_stopped: bool
    reason: str


def work_dir(state_dir: Path, *, job_id: str, epoch: int) -> Path:
    """Where the attempt's worker keeps what it is about to publish. The worker removes it; of a killed one the service does."""
    return state_dir / "work" / f"{job_id}-{epoch}"


class Launcher(Protocol):
    """Starts and ends workers. A worker outlives a service that crashes; its lease says whether it is alive."""

    async def start(self, attempt: Attempt) -> None:
        """Starts the attempt's worker. Raises FineryError where it cannot."""
        ...

    def take_exits(self) -> list[Exit]:
        """The workers that ended since the last call."""
        ...

    async def kill(self, job_id: str) -> None:
        """Ends the job's worker at once, where this launcher has one."""
        ...

    async def stop_all(self, *, grace_s: float) -> None:
        """Asks every worker to save its state and end; kills what has not after `grace_s` seconds."""
        ...
