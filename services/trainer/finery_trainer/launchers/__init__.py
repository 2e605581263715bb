"""How a worker process comes to be: `local` as a subprocess, `kubernetes` as a Job. The scheduler knows the protocol alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

STOPPED_EXIT_CODE = 75
"""What a worker that was told to stop, and saved its state, exits with (sysexits' EX_TEMPFAIL)."""
CONFIG_EXIT_CODE = 78
"""What a worker whose settings are wrong exits with (sysexits' EX_CONFIG): another attempt would end the same."""


@dataclass(frozen=True)
class Attempt:
    """One try at a job, the token that lets its worker report, and the GPUs that the job's spec wants."""

    job_id: str
    epoch: int
    token: str
    gpus: int = 1


@dataclass(frozen=True)
class Exit:
    """A worker that ended. `was_stopped` where it ended because it was told to, or lost its place through no fault of its own;
    `is_final` where another attempt would end the same, `never_began` where the worker's program never ran, which says nothing of the job.
    `reason` is for people, as in "the worker …".
    """

    job_id: str
    epoch: int
    was_stopped: bool
    reason: str
    is_final: bool = False
    never_began: bool = False


@dataclass(frozen=True)
class Waiting:
    """A worker that was asked for and has not begun. `reason` is a word that changes when the cause does, empty while all is as usual."""

    job_id: str
    epoch: int
    reason: str
    text: str


def work_dir(state_dir: Path, *, job_id: str, epoch: int) -> Path:
    """Where the attempt's worker keeps what it is about to publish. The worker removes it; of a killed one the service does."""
    return state_dir / "work" / f"{job_id}-{epoch}"


class Launcher(Protocol):
    """Starts and ends workers. A worker outlives a service that crashes; its lease says whether it is alive."""

    async def check(self, attempt: Attempt) -> None:
        """Raises UnavailableError or PermissionDeniedError where it is known that `start` would. Nothing is started."""
        ...

    async def start(self, attempt: Attempt) -> None:
        """Starts the attempt's worker, or has it wait for a place.

        Raises UnavailableError or PermissionDeniedError where it can only start later, FailedPreconditionError where it never can.
        """
        ...

    def waiting(self) -> list[Waiting]:
        """The workers that have not begun: they cannot hold their leases themselves."""
        ...

    def take_exits(self) -> list[Exit]:
        """The workers that ended since the last call."""
        ...

    def log_place(self, job_id: str, *, epoch: int) -> str:
        """Where the attempt's log is to be found, for people."""
        ...

    async def kill(self, job_id: str) -> None:
        """Ends the job's worker at once, where this launcher has one. Raises UnavailableError where that must be tried again."""
        ...

    async def stop_all(self, *, grace_s: float) -> None:
        """The service ends. Workers that need its machine save their states and end, or are killed after `grace_s` seconds."""
        ...
