"""What services share survives the wire."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from finery.common.v1 import job_pb2
from finery_common.artifacts import ArtifactRef
from finery_common.errors import InvalidArgumentError, Violation
from finery_common.jobs import EventLevel, JobEvent, JobState
from finery_common.rpc import messages


@pytest.mark.parametrize("state", JobState)
def test_a_state_survives_the_wire(state: JobState):
    assert messages.state_from_proto(messages.state_to_proto(state)) is state


def test_an_error_survives_the_wire_with_its_lines():
    error = InvalidArgumentError("2 rows are wrong", code="bad_rows", violations=(Violation("f", "x", 3), Violation("f", "y")))
    fields = messages.error_fields(error)
    proto = messages.error_to_proto(fields)
    assert proto is not None
    assert messages.error_from_proto(proto) == fields


def test_an_artifact_survives_the_wire_and_a_malformed_one_is_refused():
    ref = ArtifactRef(prefix="projects/p/adapters/ftjob-1-2/", manifest_sha256="0" * 64, kind="adapter", size_bytes=5)
    assert messages.artifact_from_proto(messages.artifact_to_proto(ref)) == ref
    with pytest.raises(InvalidArgumentError, match="manifest_sha256"):
        messages.artifact_from_proto(job_pb2.ArtifactRef(prefix="x", kind="adapter"))


def test_an_event_keeps_its_data():
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    event = JobEvent(7, now, EventLevel.WARN, "step", "Step 1.", JobState.RUNNING, {"loss": 1.5, "nested": {"a": [1.0, "x"]}})
    proto = messages.event_to_proto(event)
    assert (proto.sequence, proto.level, proto.state) == (7, job_pb2.EVENT_LEVEL_WARN, job_pb2.JOB_STATE_RUNNING)
    assert messages.from_timestamp(proto.create_time) == now
    assert messages.struct_fields(proto.data) == {"loss": 1.5, "nested": {"a": [1.0, "x"]}}
