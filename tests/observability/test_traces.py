"""One trace from the REST call that creates a job to the first token of its adapter, over the whole system."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.system import FAST_SPEC, System, code_word_rows, start_system, stop_system, wait_job, wait_served
from observability.collector import Collector, Span, running_collector

from finery_cli.local.stack import QUICKSTART_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEEN_S = 60.0
FIRST_TOKEN = "gen_ai.latency.time_to_first_token"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced(collector: Collector, tmp_path_factory: pytest.TempPathFactory, base_model_dir: Path) -> Iterator[System]:
    """A system that sends its spans to the collector."""
    environment = {"FINERY_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    system = start_system(tmp_path_factory.mktemp("traced"), base_model_dir, environment=environment)
    try:
        wait_served(system)
        yield system
    finally:
        stop_system(system)


def new_trace() -> tuple[str, dict[str, str]]:
    """(trace, the header of a caller that is in it)."""
    trace = secrets.token_hex(16)
    return trace, {"traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"}


def wait_spans(collector: Collector, trace: str, names: set[str]) -> dict[str, Span]:
    """The trace's spans by id, once there is one of each name."""
    deadline_s = time.monotonic() + SEEN_S
    while not names <= (seen := {span.name for span in collector.of_trace(trace)}):
        assert time.monotonic() < deadline_s, f"not seen: {names - seen}; seen: {seen}"
        time.sleep(0.2)
    return {span.id: span for span in collector.of_trace(trace)}


def first_token_of(spans: dict[str, Span]) -> Span:
    """vLLM's span, which tells when the first token came."""
    [found] = [span for span in spans.values() if span.name == "llm_request"]
    assert FIRST_TOKEN in found.attributes
    return found


def test_a_job_is_one_trace_from_its_creation_to_the_first_token(traced: System, collector: Collector):
    client = traced.client()
    file = client.files.create(file=("rows.jsonl", code_word_rows("cedar")), purpose="fine-tune")
    trace, header = new_trace()
    body = {"spec": FAST_SPEC | {"max_steps": 1}, "deploy": True}
    job = client.fine_tuning.jobs.create(model=QUICKSTART_MODEL, training_file=file.id, extra_body=body, extra_headers=header)
    assert wait_job(client, job.id, "succeeded") == "succeeded"

    way = {
        ("finery-gateway", "POST /v1/fine_tuning/jobs"),
        ("finery-trainer", "/finery.training.v1.TrainingService/CreateJob"),
        ("finery-trainer", "validate job"),
        ("finery-dataprep", "/finery.dataset.v1.DatasetService/CreateDataset"),
        ("finery-trainer", "launch worker"),
        ("finery-trainer-worker", "train job"),
        ("finery-trainer-worker", "fetch"),
        ("finery-trainer-worker", "load"),
        ("finery-trainer-worker", "train"),
        ("finery-trainer-worker", "publish"),
        ("finery-trainer", "deploy adapter"),
        ("finery-serving", "/finery.serving.v1.ServingService/DeployAdapter"),
        ("finery-serving", "rollout: load"),
        ("finery-serving", "rollout: probe"),
    }
    spans = wait_spans(collector, trace, {name for _, name in way} | {"llm_request"})
    assert {(span.service, span.name) for span in spans.values()} >= way
    assert spans[first_token_of(spans).parent].name == "rollout: probe"
    roots = [span for span in spans.values() if span.parent not in spans]
    assert [(span.name, span.parent) for span in roots] == [("POST /v1/fine_tuning/jobs", header["traceparent"].split("-")[2])]


def test_a_generation_is_one_trace_to_its_first_token(traced: System, collector: Collector):
    trace, header = new_trace()
    messages = [{"role": "user", "content": "Hello"}]
    traced.client().chat.completions.create(model=QUICKSTART_MODEL, messages=messages, max_tokens=2, extra_headers=header)
    spans = wait_spans(collector, trace, {"llm_request", "POST /v1/chat/completions"})
    request = spans[first_token_of(spans).parent]
    assert (request.name, request.parent) == ("POST /v1/chat/completions", header["traceparent"].split("-")[2])
