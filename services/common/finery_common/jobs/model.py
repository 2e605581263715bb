"""What a job is: its states and which follow which, its events, its lease. Values only, no database."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from finery_common.errors import FailedPreconditionError, InvalidArgumentError


class JobState(StrEnum):
    """Where a job stands; the names are those of the wire."""

    QUEUED = "QUEUED"
    VALIDATING = "VALIDATING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_final(self) -> bool:
        """No state follows."""
        return not TRANSITIONS[self]

    @property
    def is_active(self) -> bool:
        """Somebody works on the job and ought to hold its lease."""
        return self in (JobState.VALIDATING, JobState.RUNNING)


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.VALIDATING, JobState.RUNNING, JobState.PAUSED, JobState.FAILED, JobState.CANCELLED}),
    # Back to QUEUED: validated and waiting for a place, or taken from an attempt that died.
    JobState.VALIDATING: frozenset({JobState.QUEUED, JobState.RUNNING, JobState.PAUSED, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


def check_transition(job_id: str, from_state: JobState, to_state: JobState) -> None:
    """Raises FailedPreconditionError, naming both states, where `TRANSITIONS` does not allow the step."""
    if to_state not in TRANSITIONS[from_state]:
        allowed = ", ".join(sorted(TRANSITIONS[from_state])) or "nothing: the state is final"
        raise FailedPreconditionError(f"Job {job_id} is {from_state} and cannot become {to_state}; from there it may become {allowed}.")


class Wanted(StrEnum):
    """What somebody asked of a job and whoever works on it has yet to do."""

    NONE = "none"
    PAUSE = "pause"
    CANCEL = "cancel"


class EventLevel(StrEnum):
    """How loud an event is."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True)
class Job:
    """One job as it stood when it was read. Times are aware and in UTC."""

    id: str
    kind: str
    project: str
    state: JobState
    spec: dict[str, object]
    result: dict[str, object]
    error: dict[str, object] | None
    progress: dict[str, object]
    metadata: dict[str, str]
    wanted: Wanted
    epoch: int
    """Counts the leases given so far; 0 before the first."""
    lease_expires_at: datetime | None
    """None while nobody holds the lease."""
    created_at: datetime
    started_at: datetime | None
    """When it first became RUNNING."""
    finished_at: datetime | None
    updated_at: datetime
    last_sequence: int
    """The sequence of its newest event."""


@dataclass(frozen=True)
class JobEvent:
    """One change of a job. `state` is the job's state after it."""

    sequence: int
    created_at: datetime
    level: EventLevel
    type: str
    message: str
    state: JobState
    data: dict[str, object]


@dataclass(frozen=True)
class JobPage:
    """Some jobs, newest first; `next_page_token` is empty on the last page."""

    jobs: tuple[Job, ...]
    next_page_token: str


@dataclass(frozen=True)
class Lease:
    """The right to write as the job's attempt number `epoch`."""

    job_id: str
    epoch: int


# An escaped NUL, not preceded by a backslash that is itself escaped.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def canonical_json(value: object, *, what: str) -> str:
    """`value` as JSON, in the one form that equal values share.

    Raises InvalidArgumentError, naming `what`, for what JSON or PostgreSQL cannot hold: NaN, infinity, lone surrogates, U+0000.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{what} cannot be stored: {error}; want JSON with finite numbers and valid Unicode.") from error
    if _NUL.search(text):
        raise InvalidArgumentError(f"{what} contains the character U+0000, which cannot be stored; remove it.")
    return text
