"""What services share on the wire, to and from their own types: states, events, errors, artifact references, times.

A job's error is kept as plain data (`error_fields`), so that the job library needs no protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from finery.common.v1 import job_pb2
from finery_common.artifacts import ArtifactRef
from finery_common.errors import FineryError
from finery_common.jobs import EventLevel, JobEvent, JobState
from finery_common.spec import invalid_fields


def timestamp(time: datetime | None) -> Timestamp | None:
    """`time` as a proto; None stays None, which leaves a message field unset."""
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message


def from_timestamp(message: Timestamp) -> datetime:
    """An aware time in UTC."""
    return message.ToDatetime(tzinfo=UTC)


def state_to_proto(state: JobState) -> job_pb2.JobState:
    """The wire's name for `state`."""
    return _STATES[state]


def state_from_proto(state: job_pb2.JobState) -> JobState:
    """The inverse of `state_to_proto`."""
    return JobState(job_pb2.JobState.Name(state).removeprefix("JOB_STATE_"))


def artifact_to_proto(ref: ArtifactRef) -> job_pb2.ArtifactRef:
    """`ref` on the wire."""
    return job_pb2.ArtifactRef(prefix=ref.prefix, manifest_sha256=ref.manifest_sha256, kind=ref.kind, size_bytes=ref.size_bytes)


def artifact_from_proto(ref: job_pb2.ArtifactRef) -> ArtifactRef:
    """Raises InvalidArgumentError where a field is missing or malformed."""
    fields = {"prefix": ref.prefix, "manifest_sha256": ref.manifest_sha256, "kind": ref.kind, "size_bytes": ref.size_bytes}
    try:
        return ArtifactRef.model_validate(fields)
    except ValidationError as error:
        raise invalid_fields(error) from error


def error_fields(error: FineryError) -> dict[str, object]:
    """`error` as the plain data kept in a job: code, message, param, violations."""
    violations = [{"field": item.field, "description": item.description, "line": item.line} for item in error.violations]
    return {"code": error.code, "message": error.message, "param": error.param, "violations": violations}


def error_to_proto(fields: Mapping[str, object] | None) -> job_pb2.JobError | None:
    """The JobError of what `error_fields` made."""
    if fields is None:
        return None
    return ParseDict(_without_none(dict(fields)), job_pb2.JobError(), ignore_unknown_fields=True)


def error_from_proto(error: job_pb2.JobError) -> dict[str, object]:
    """The inverse of `error_to_proto`."""
    violations = [
        {"field": item.field, "description": item.description, "line": item.line if item.HasField("line") else None}
        for item in error.violations
    ]
    return {
        "code": error.code,
        "message": error.message,
        "param": error.param if error.HasField("param") else None,
        "violations": violations,
    }


def event_to_proto(event: JobEvent) -> job_pb2.JobEvent:
    """`event` on the wire."""
    return job_pb2.JobEvent(
        sequence=event.sequence,
        create_time=timestamp(event.created_at),
        level=_LEVELS[event.level],
        type=event.type,
        message=event.message,
        state=state_to_proto(event.state),
        data=struct(event.data),
    )


def struct(data: Mapping[str, object]) -> Struct:
    """Plain data as a Struct; numbers become doubles."""
    return ParseDict(dict(data), Struct())


def struct_fields(message: Struct) -> dict[str, object]:
    """The inverse of `struct`."""
    return cast("dict[str, object]", MessageToDict(message))


_STATES: dict[JobState, job_pb2.JobState] = {
    state: cast("job_pb2.JobState", job_pb2.JobState.Value(f"JOB_STATE_{state}")) for state in JobState
}
_LEVELS = {
    EventLevel.INFO: job_pb2.EVENT_LEVEL_INFO,
    EventLevel.WARN: job_pb2.EVENT_LEVEL_WARN,
    EventLevel.ERROR: job_pb2.EVENT_LEVEL_ERROR,
}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in cast("Mapping[str, Any]", value).items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_none(item) for item in cast("Sequence[Any]", value)]
    return value
