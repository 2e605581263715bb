"""What a scrape of the training service, or of a worker, says after events."""

from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import REGISTRY

from finery_common.jobs import JobState
from finery_trainer.client import WorkerClient
from finery_trainer.records import AWAITING_BASE, StepMetrics
from finery_trainer.worker_metrics import VramCollector

STEP = StepMetrics(
    1,
    6,
    0.3,
    2.5,
    1e-4,
    0.3,
    100.0,
    50,
    2**30,
    2.25,
    data_wait_seconds=0.01,
    mfu=0.4,
    memory_allocated_bytes=2**28,
    memory_reserved_bytes=2**29,
)


async def started_worker(launcher):
    attempt = await launcher.attempt()
    return attempt.job_id, WorkerClient(launcher.address, token=attempt.token)


def shown(job_id):
    """Gauge -> value, of one job."""
    samples = [sample for family in REGISTRY.collect() for sample in family.samples if sample.labels.get("job_id") == job_id]
    return {sample.name.removeprefix("finery_trainer_"): sample.value for sample in samples}


def counted(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_a_step_is_shown_as_it_was_reported_until_the_job_ends(system, launcher, wait_until):
    tokens, failures = counted("finery_trainer_tokens_total"), counted("finery_trainer_job_failures_total", code="non_finite_loss")
    await system.create()
    job_id, client = await started_worker(launcher)
    await client.report_step(STEP)
    values = shown(job_id)
    assert time.time() - values.pop("last_progress_timestamp_seconds", time.time()) < 20
    assert values == {
        "tokens_per_second": 100.0,
        "mfu_ratio": 0.4,
        "loss": 2.5,
        "validation_loss": 2.25,
        "grad_norm": 0.3,
        "learning_rate": 1e-4,
        "step": 1,
        "steps": 6,
        "data_wait_seconds": 0.01,
        "memory_bytes": 2**30,
        "memory_allocated_bytes": 2**28,
        "memory_reserved_bytes": 2**29,
    }
    await client.report_step(StepMetrics(2, 6, 0.6, 2.4, 1e-4, 0.3, 100.0, 120, 2**30))
    # What a step has no value for keeps the one before; a pace comes with the second step.
    assert shown(job_id) | {"step": 2, "loss": 2.4, "mfu_ratio": 0.4} == shown(job_id)
    assert shown(job_id)["seconds_per_step"] > 0
    assert counted("finery_trainer_tokens_total") == tokens + 120
    await client.finish(JobState.FAILED, error={"code": "non_finite_loss", "message": "loss is nan", "violations": []})
    await client.close()
    await wait_until_gone(job_id, wait_until)
    assert counted("finery_trainer_job_failures_total", code="non_finite_loss") == failures + 1


async def wait_until_gone(job_id, wait_until):
    async def is_gone() -> bool:
        return shown(job_id) == {}

    await wait_until(is_gone)


async def test_a_job_that_waits_and_one_that_works_say_since_when(system, launcher, wait_until):
    await system.create()
    job_id, client = await started_worker(launcher)

    async def is_waiting() -> bool:
        return counted("finery_trainer_oldest_queued_seconds") > 0.5

    await wait_until(is_waiting)
    assert "last_progress_timestamp_seconds" not in shown(job_id), "a job whose worker has not called waits, and is not stalled"
    await client.heartbeat("loading the base model")

    async def waits_no_more() -> bool:
        return counted("finery_trainer_oldest_queued_seconds") == 0 and "last_progress_timestamp_seconds" in shown(job_id)

    await wait_until(waits_no_more)
    await system.create()
    await wait_until(is_waiting)
    before = shown(job_id)["last_progress_timestamp_seconds"]

    async def has_progressed() -> bool:
        return shown(job_id)["last_progress_timestamp_seconds"] > before

    await client.heartbeat(AWAITING_BASE)
    await wait_until(has_progressed)
    await client.heartbeat("loading the base model")
    before = shown(job_id)["last_progress_timestamp_seconds"]
    await client.report_step(STEP)
    await wait_until(has_progressed)
    await client.finish(JobState.CANCELLED)
    await client.close()


def test_a_worker_without_a_gpu_in_use_has_no_vram():
    registry = CollectorRegistry()
    registry.register(VramCollector("ftjob-1"))
    assert "finery_worker_vram_bytes{" not in generate_latest(registry).decode()


@pytest.mark.gpu
def test_a_worker_tells_what_its_process_holds_of_the_gpu():
    import torch

    held = torch.zeros(1 << 20, device="cuda")
    registry = CollectorRegistry()
    registry.register(VramCollector("ftjob-1"))
    values = {
        kind: registry.get_sample_value("finery_worker_vram_bytes", {"job_id": "ftjob-1", "gpu": "0", "kind": kind}) or 0.0
        for kind in ("allocated", "reserved", "peak")
    }
    assert held.nbytes <= values["allocated"] <= values["reserved"]
    assert values["peak"] >= values["allocated"]
