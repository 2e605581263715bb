"""Jobs without training: what happens in which state, order, lost attempts, zombies, deployment."""

from __future__ import annotations

import asyncio
import errno

import pytest
from transformers import LlamaConfig

from finery.common.v1 import job_pb2
from finery.training.v1 import training_pb2
from finery_common.errors import (
    AbortedError,
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from finery_common.jobs import JobState, JobStore
from finery_common.rpc.messages import error_fields
from finery_common.rpc.tokens import Principal
from finery_common.spec import Precision, TrainingSpec
from finery_trainer.client import Assignment, Command, WorkerClient
from finery_trainer.engine.architecture import describe
from finery_trainer.engine.planner import Ranks, Workload, plan_step
from finery_trainer.launchers import Attempt
from finery_trainer.link import AttemptOver, Link
from finery_trainer.publishing import MetricsTable, Publisher
from finery_trainer.records import CheckpointReport, StepMetrics
from finery_trainer.worker import explain

ANOTHER = "ftjob-" + "0" * 24


async def attempt_of(launcher, wait_until, *, number=1) -> Attempt:
    async def is_started() -> bool:
        return len(launcher.attempts) >= number

    await wait_until(is_started)
    return launcher.attempts[number - 1]


async def worker_client(launcher, attempt) -> WorkerClient:
    return WorkerClient(launcher.address, token=attempt.token)


def metrics_of(step, *, num_steps=6) -> StepMetrics:
    return StepMetrics(step, num_steps, step / 3, 2.5, 1e-4, 0.3, 100.0, 50 * step, 2**20)


def publish(system, prefix, kind):
    with system.store.writer(f"projects/{system.project}/{prefix}", kind=kind) as writer:
        writer.put_bytes("content", data=b"x")
        return writer.publish(made_from={}, spec={}, attempt="test")


def named(job):
    return job.name.rpartition("/")[2]


async def test_bad_rows_fail_the_job_with_their_lines(system, launcher):
    file = system.upload()
    system.dataprep.errors[file] = job_pb2.JobError(
        code="invalid_training_file",
        param="file",
        message="2 rows are wrong",
        violations=[job_pb2.Violation(field=file, description="not JSON", line=7)],
    )
    job = await system.create(validation_file=file)
    job = await system.wait(job.name, "FAILED")
    assert (job.error.code, job.error.param, job.error.message) == ("invalid_validation_file", "validation_file", "2 rows are wrong")
    assert [(item.line, item.description) for item in job.error.violations] == [(7, "not JSON")]
    assert job.deployment.state == training_pb2.DEPLOYMENT_STATE_NONE
    assert not launcher.attempts


@pytest.mark.parametrize(
    ("code", "param", "wanted_param"), [("file_not_found", "file", "training_file"), ("no_chat_template", "", ""), ("disk_full", "", "")]
)
async def test_what_is_not_the_files_fault_is_not_said_of_it(system, launcher, code, param, wanted_param):
    file = system.upload()
    system.dataprep.errors[file] = job_pb2.JobError(code=code, param=param, message="as dataprep says")
    job = await system.wait((await system.create(training_file=file)).name, "FAILED")
    assert (job.error.code, job.error.param, job.error.message) == (code, wanted_param, "as dataprep says")


@pytest.mark.parametrize("refusal", [FailedPreconditionError("no template", code="no_chat_template"), AlreadyExistsError("taken")])
async def test_what_dataprep_refuses_for_good_fails_the_job_with_its_reason(system, launcher, refusal):
    system.dataprep.refusal = refusal
    job = await system.wait((await system.create()).name, "FAILED", timeout_s=10)
    assert (job.error.code, job.error.message) == (refusal.code, refusal.message)


async def test_a_dataprep_that_stays_away_fails_the_job_in_the_end(system, launcher, monkeypatch):
    monkeypatch.setattr("finery_trainer.validation.PATIENCE_S", 0.5)
    system.dataprep.refusal = UnavailableError("dataprep is away")
    job = await system.create()
    failed = await system.wait(job.name, "FAILED", timeout_s=20)
    assert failed.error.code == "unavailable"
    assert "Data preparation has not worked for" in failed.error.message
    assert sum("Waiting for data preparation" in event["message"] for event in await system.events(job.name)) == 1


async def test_dataprep_gets_the_specs_length_and_deterministic_request_ids(system, launcher, wait_until):
    job = await system.create(spec={"max_sequence_length": 32}, validation_file=system.upload())
    await attempt_of(launcher, wait_until)
    job = await system.get(job.name)
    assert [system.dataprep.specs[name].max_sequence_length for name in (job.training_dataset, job.validation_dataset)] == [32, 32]
    assert [system.dataprep.specs[name].file for name in (job.training_dataset, job.validation_dataset)] == [
        job.training_file,
        job.validation_file,
    ]


@pytest.mark.parametrize("kind", [UnavailableError, DeadlineExceededError, ResourceExhaustedError, InternalError, AbortedError])
async def test_a_job_waits_while_dataprep_cannot_work(system, launcher, wait_until, kind):
    system.dataprep.refusal = kind("not now")
    job = await system.create()

    async def is_told() -> bool:
        return any("Waiting for data preparation" in event["message"] for event in await system.events(job.name))

    await wait_until(is_told)
    system.dataprep.refusal = None
    await attempt_of(launcher, wait_until)


@pytest.mark.parametrize("state", ["QUEUED", "VALIDATING", "PAUSED"])
async def test_a_job_that_does_not_run_is_cancelled(system, launcher, wait_until, state):
    if state == "QUEUED":
        await system.create()
        await attempt_of(launcher, wait_until)
    system.dataprep.ready = state != "VALIDATING"
    job = await system.create()
    if state == "PAUSED":
        await system.stub.PauseJob(training_pb2.PauseJobRequest(name=job.name), metadata=system.metadata())
    await system.wait(job.name, state)
    await system.stub.CancelJob(training_pb2.CancelJobRequest(name=job.name), metadata=system.metadata())
    job = await system.wait(job.name, "CANCELLED", timeout_s=10)
    if state == "VALIDATING":
        await wait_until(lambda: _contains(system.dataprep.cancelled, job.training_dataset))


async def _contains(items, item) -> bool:
    return item in items


async def test_a_paused_job_is_resumed_and_a_running_one_cannot_be(system, launcher, wait_until):
    system.dataprep.ready = False
    job = await system.create()
    await system.stub.PauseJob(training_pb2.PauseJobRequest(name=job.name), metadata=system.metadata())
    await system.wait(job.name, "PAUSED")
    system.dataprep.ready = True
    await system.stub.ResumeJob(training_pb2.ResumeJobRequest(name=job.name), metadata=system.metadata())
    await attempt_of(launcher, wait_until)
    with pytest.raises(FailedPreconditionError, match="only a paused job"):
        await system.stub.ResumeJob(training_pb2.ResumeJobRequest(name=job.name), metadata=system.metadata())


@pytest.mark.parametrize(
    ("wishes", "state"), [("pc", "CANCELLED"), ("prc", "CANCELLED"), ("pr", "QUEUED"), ("prp", "PAUSED"), ("p", "PAUSED")]
)
async def test_what_was_wished_during_a_pauses_save_is_obeyed(system, launcher, wait_until, wishes, state):
    job = await system.create()
    client = await worker_client(launcher, await attempt_of(launcher, wait_until))
    await client.report_step(metrics_of(1))
    for wish in wishes:
        await ask(system, job, wish)
    await client.finish(JobState.PAUSED)
    states = [event["state"] for event in await system.events(job.name) if event["type"] == "state"]
    assert f"JOB_STATE_{state}" in states[states.index("JOB_STATE_RUNNING") + 1 :]
    if state == "QUEUED":
        await attempt_of(launcher, wait_until, number=2)
    else:
        job = await system.wait(job.name, state, timeout_s=5)
        assert job.deployment.state == training_pb2.DEPLOYMENT_STATE_NONE or state == "PAUSED"
    await client.close()


async def ask(system, job, wish):
    call, request = {
        "p": (system.stub.PauseJob, training_pb2.PauseJobRequest),
        "r": (system.stub.ResumeJob, training_pb2.ResumeJobRequest),
        "c": (system.stub.CancelJob, training_pb2.CancelJobRequest),
    }[wish]
    await call(request(name=job.name), metadata=system.metadata())


@pytest.mark.parametrize(("wish", "state"), [("c", JobState.CANCELLED), ("r", JobState.QUEUED)])
async def test_a_wish_that_meets_the_end_of_a_pauses_save_is_obeyed(system, launcher, wait_until, monkeypatch, wish, state):
    job = await system.create()
    client = await worker_client(launcher, await attempt_of(launcher, wait_until))
    await ask(system, job, "p")
    get, has_finished = JobStore.get, False

    async def get_then_finish(jobs, project, job_id):
        nonlocal has_finished
        found = await get(jobs, project, job_id)
        if not has_finished:
            has_finished = True
            await client.finish(JobState.PAUSED)
        return found

    monkeypatch.setattr(JobStore, "get", get_then_finish)
    await ask(system, job, wish)
    events = await system.events(job.name)
    states = [event["state"] for event in events if event["type"] == "state"]
    assert f"JOB_STATE_{state}" in states[states.index("JOB_STATE_PAUSED") :]
    await client.close()


async def test_each_attempts_phases_are_events(system, launcher, wait_until):
    job = await system.create()
    for number in (1, 2):
        attempt = await attempt_of(launcher, wait_until, number=number)
        client = await worker_client(launcher, attempt)
        for _ in range(2):
            await client.heartbeat("training")
        await client.close()
        launcher.end(attempt)
    assert sum(event["message"] == "The worker is training." for event in await system.events(job.name)) == 2


async def test_jobs_run_one_at_a_time_in_the_order_of_their_creation(system, launcher, wait_until):
    jobs = [await system.create() for _ in range(3)]
    for number, job in enumerate(jobs, start=1):
        attempt = await attempt_of(launcher, wait_until, number=number)
        assert attempt.job_id == named(job)
        assert len(launcher.attempts) == number
        client = await worker_client(launcher, attempt)
        await client.finish(JobState.FAILED, error={"code": "x", "message": "no", "violations": []})
        await client.close()
    assert [(await system.get(job.name)).error.message for job in jobs] == ["no"] * 3


async def test_two_places_run_two_jobs(system, wait_until, fake_launcher):
    system.settings = system.settings.model_copy(update={"max_workers": 2})
    async with system.started(lambda _address: fake_launcher):
        for _ in range(3):
            await system.create()
        await attempt_of(fake_launcher, wait_until, number=2)
        jobs = (
            await system.stub.ListJobs(training_pb2.ListJobsRequest(parent=f"projects/{system.project}"), metadata=system.metadata())
        ).jobs
        assert sum(job.state == job_pb2.JOB_STATE_RUNNING for job in jobs) == 2


async def test_a_job_is_given_up_after_three_lost_attempts_without_a_checkpoint(system, launcher, wait_until):
    job = await system.create()
    for number in (1, 2, 3, 4):
        attempt = await attempt_of(launcher, wait_until, number=number)
        assert attempt.epoch > number
        if number == 2:
            client = await worker_client(launcher, attempt)
            state = publish(system, f"runs/{named(job)}/checkpoints/2/", "checkpoint")
            await client.report_checkpoint(CheckpointReport(2, state, None, metrics_of(2)))
            await client.close()
        launcher.end(attempt)
    job = await system.wait(job.name, "FAILED")
    assert job.error.code == "worker_lost"
    assert "SIGKILL" in job.error.message
    assert len(launcher.attempts) == 4


async def test_a_worker_that_was_told_to_stop_counts_for_nothing(system, launcher, wait_until):
    await system.create()
    for number in range(1, 6):
        launcher.end(await attempt_of(launcher, wait_until, number=number), was_stopped=True)
    await attempt_of(launcher, wait_until, number=6)


@pytest.mark.parametrize("method", ["find", "transition"])
async def test_a_workers_end_is_noted_once_the_database_is_back(system, launcher, wait_until, monkeypatch, method):
    job = await system.create()
    attempt = await attempt_of(launcher, wait_until)

    async def is_away(*_arguments, **_fields):
        raise UnavailableError("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, method, is_away)
        launcher.end(attempt, was_stopped=True)
        await asyncio.sleep(1.2)
    await attempt_of(launcher, wait_until, number=2)
    assert any("goes on from its last checkpoint" in event["message"] for event in await system.events(job.name))


async def test_a_silent_worker_loses_its_job(system, wait_until, fake_launcher):
    system.settings = system.settings.model_copy(update={"lease_s": 0.5})
    async with system.started(lambda _address: fake_launcher):
        job = await system.create()
        await attempt_of(fake_launcher, wait_until, number=2)
        assert fake_launcher.killed[0] == named(job)


async def test_a_worker_that_does_not_obey_a_cancellation_is_ended(system, wait_until, fake_launcher):
    system.settings = system.settings.model_copy(update={"cancel_grace_s": 0.5})
    async with system.started(lambda _address: fake_launcher):
        job = await system.create()
        await attempt_of(fake_launcher, wait_until)
        await system.stub.CancelJob(training_pb2.CancelJobRequest(name=job.name), metadata=system.metadata())
        await system.wait(job.name, "CANCELLED", timeout_s=10)
        assert fake_launcher.killed == [named(job)]


async def test_a_zombie_can_neither_report_nor_publish(system, launcher, wait_until, tmp_path):
    job = await system.create(deploy=False)
    zombie = await attempt_of(launcher, wait_until)
    launcher.end(zombie)
    successor = await attempt_of(launcher, wait_until, number=2)
    old, new = await worker_client(launcher, zombie), await worker_client(launcher, successor)
    assert await new.report_step(metrics_of(1)) is Command.CONTINUE
    state = publish(system, f"runs/{named(job)}/checkpoints/2/", "checkpoint")
    for call in (
        old.assignment(),
        old.heartbeat("training"),
        old.report_step(metrics_of(2)),
        old.report_checkpoint(CheckpointReport(2, state, None, metrics_of(2))),
        old.finish(JobState.SUCCEEDED, adapter=state, metrics_file=state),
    ):
        with pytest.raises(AbortedError):
            await call
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("old")
    work = Assignment(system.project, zombie.job_id, zombie.epoch, TrainingSpec(base_model="tiny"), state, None, None)
    with Link(launcher.address, token=zombie.token, heartbeat_s=60, tolerance_s=1) as link:
        publisher = Publisher(
            system.store, assignment=work, base_sha256="0" * 64, precision=Precision.FLOAT32, device="cpu", confirm=link.confirm
        )
        with pytest.raises(AttemptOver):
            await asyncio.to_thread(publisher.adapter, tmp_path / "adapter", step=6)
    assert not system.store.exists(f"projects/{system.project}/adapters/{zombie.job_id}-6/")
    assert (await system.get(job.name)).metrics.step == 1
    assert await system.steps(job.name) == [1]
    await old.close()
    await new.close()


async def test_a_worker_may_call_nothing_but_its_own_service(system, launcher, wait_until):
    from finery_common.errors import PermissionDeniedError
    from finery_common.rpc.channel import bearer

    job = await system.create()
    attempt = await attempt_of(launcher, wait_until)
    with pytest.raises(PermissionDeniedError):
        await system.stub.GetJob(training_pb2.GetJobRequest(name=job.name), metadata=bearer(attempt.token))
    client = WorkerClient(launcher.address, token=system.signer.sign(Principal("test", system.project)))
    with pytest.raises(PermissionDeniedError):
        await client.assignment()
    await client.close()


async def test_a_step_that_is_reported_twice_is_one_event(system, launcher, wait_until):
    job = await system.create()
    client = await worker_client(launcher, await attempt_of(launcher, wait_until))
    for step in (1, 1, 2, 2):
        await client.report_step(metrics_of(step))
    assert await system.steps(job.name) == [1, 2]
    job = await system.get(job.name)
    assert job.estimated_finish_time.seconds > 0
    await client.close()


async def test_full_states_beyond_those_to_keep_are_removed(system, launcher, wait_until):
    job = await system.create(spec={"checkpoint": {"interval_steps": 1, "keep": 2}})
    client = await worker_client(launcher, await attempt_of(launcher, wait_until))
    for step in (1, 2, 3):
        state = publish(system, f"runs/{named(job)}/checkpoints/{step}/", "checkpoint")
        for _ in range(2):
            await client.report_checkpoint(CheckpointReport(step, state, None, metrics_of(step)))
    left = [ref.prefix.split("/")[-2] for ref in system.store.list(f"projects/{system.project}/runs/{named(job)}/")]
    assert left == ["2", "3"]
    assert sum(event["type"] == "checkpoint" for event in await system.events(job.name)) == 3
    assert (await client.assignment()).checkpoint == state
    await client.close()


async def test_an_artifact_that_is_not_this_attempts_is_refused(system, launcher, wait_until):
    job = await system.create()
    client = await worker_client(launcher, await attempt_of(launcher, wait_until))
    foreign = publish(system, f"runs/{ANOTHER}/checkpoints/2/", "checkpoint")
    with pytest.raises(InvalidArgumentError, match="prefix"):
        await client.report_checkpoint(CheckpointReport(2, foreign, None, metrics_of(2)))
    assert (await system.get(job.name)).state == job_pb2.JOB_STATE_RUNNING
    await client.close()


async def succeed(system, launcher, wait_until, **fields):
    number = len(launcher.attempts) + 1
    job = await system.create(**fields)
    client = await worker_client(launcher, await attempt_of(launcher, wait_until, number=number))
    await client.report_step(metrics_of(6))
    adapter = publish(system, f"adapters/{named(job)}-6/", "adapter")
    state = publish(system, f"runs/{named(job)}/checkpoints/6/", "checkpoint")
    await client.report_checkpoint(CheckpointReport(6, state, adapter, metrics_of(6)))
    metrics_file = publish(system, f"runs/{named(job)}/metrics/", "metrics")
    await client.finish(JobState.SUCCEEDED, adapter=adapter, metrics_file=metrics_file)
    await client.close()
    await system.watched(job.name)
    return await system.get(job.name)


async def test_a_success_is_what_its_method_makes(system, launcher, wait_until):
    job = await system.create(spec={"method": "full"}, deploy=False)
    client = await worker_client(launcher, await attempt_of(launcher, wait_until))
    await client.report_step(metrics_of(6))
    adapter, model = publish(system, f"adapters/{named(job)}-6/", "adapter"), publish(system, f"models/{named(job)}/", "model")
    foreign, metrics_file = publish(system, f"models/{ANOTHER}/", "model"), publish(system, f"runs/{named(job)}/metrics/", "metrics")
    for wrong in ({"adapter": adapter}, {"model": foreign}):
        with pytest.raises(InvalidArgumentError, match="model"):
            await client.finish(JobState.SUCCEEDED, **wrong, metrics_file=metrics_file)
    await client.finish(JobState.SUCCEEDED, model=model, metrics_file=metrics_file)
    await client.close()
    job = await system.get(job.name)
    assert (job.state, job.model.manifest_sha256) == (job_pb2.JOB_STATE_SUCCEEDED, model.manifest_sha256)


async def test_a_model_that_the_catalogue_names_is_not_deleted(system, wait_until, fake_launcher):
    async with system.started(lambda _address: fake_launcher) as service:
        fake_launcher.address = service.address
        job = await system.create(spec={"method": "full"}, deploy=False)
        client = await worker_client(fake_launcher, await attempt_of(fake_launcher, wait_until))
        await client.report_step(metrics_of(6))
        model, metrics_file = publish(system, f"models/{named(job)}/", "model"), publish(system, f"runs/{named(job)}/metrics/", "metrics")
        await client.finish(JobState.SUCCEEDED, model=model, metrics_file=metrics_file)
        await client.close()
    catalogue = system.settings.catalogue
    before = catalogue.read_text()
    for text in (f"{before}  - {{name: mine, s3_prefix: {model.prefix}, max_sequence_length: 64}}\n", before):
        catalogue.write_text(text)
        async with system.started(lambda _address: fake_launcher):
            request = training_pb2.DeleteJobRequest(name=job.name)
            if text != before:
                with pytest.raises(FailedPreconditionError, match="base model mine"):
                    await system.stub.DeleteJob(request, metadata=system.metadata())
            else:
                await system.stub.DeleteJob(request, metadata=system.metadata())
        assert system.store.exists(model) == (text != before)


async def test_a_deployment_that_fails_is_tried_again_and_the_job_stays_succeeded(system, launcher, wait_until):
    system.serving.failures = 1
    job = await succeed(system, launcher, wait_until)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert job.deployment.state == training_pb2.DEPLOYMENT_STATE_READY
    assert system.serving.request_ids == [f"{named(job)}-deploy-0", f"{named(job)}-deploy-1"]


async def test_a_base_that_is_not_served_is_trained_and_not_deployed(system, launcher, wait_until):
    system.serving.bases = {"another": 32}
    job = await succeed(system, launcher, wait_until)
    assert job.deployment.state == training_pb2.DEPLOYMENT_STATE_NONE
    assert "not being served" in job.deployment.message


async def test_a_deployed_job_cannot_be_deleted_and_another_goes_with_all_its_artifacts(system, launcher, wait_until):
    job = await succeed(system, launcher, wait_until)
    request = training_pb2.DeleteJobRequest(name=job.name)
    with pytest.raises(FailedPreconditionError, match="is deployed as ft:tiny"):
        await system.stub.DeleteJob(request, metadata=system.metadata())
    system.serving.aliases.clear()
    await system.stub.DeleteJob(request, metadata=system.metadata())
    assert not list(system.store.list(f"projects/{system.project}/runs/"))
    assert not list(system.store.list(f"projects/{system.project}/adapters/"))
    with pytest.raises(NotFoundError):
        await system.get(job.name)


async def test_a_job_that_is_a_canary_cannot_be_deleted(system, launcher, wait_until):
    job = await succeed(system, launcher, wait_until)
    (alias,) = system.serving.aliases.values()
    alias.canary.adapter.CopyFrom(alias.adapter)
    alias.ClearField("adapter")
    request = training_pb2.DeleteJobRequest(name=job.name)
    with pytest.raises(FailedPreconditionError, match="is deployed as ft:tiny"):
        await system.stub.DeleteJob(request, metadata=system.metadata())
    alias.ClearField("canary")
    await system.stub.DeleteJob(request, metadata=system.metadata())


async def test_a_job_that_is_not_final_cannot_be_deleted(system, launcher):
    job = await system.create()
    with pytest.raises(FailedPreconditionError, match="cancel it"):
        await system.stub.DeleteJob(training_pb2.DeleteJobRequest(name=job.name), metadata=system.metadata())


async def test_events_come_in_pages_of_either_order(system, launcher, wait_until):
    job = await succeed(system, launcher, wait_until)
    sequences = [int(event["sequence"]) for event in await system.events(job.name)]
    for descending in (False, True):
        request, seen = training_pb2.ListEventsRequest(parent=job.name, page_size=3, descending=descending), []
        while True:
            page = await system.stub.ListEvents(request, metadata=system.metadata())
            seen += [event.sequence for event in page.events]
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
        assert seen == sorted(sequences, reverse=descending)


async def test_base_models_are_those_of_the_catalogue(system, launcher):
    answer = await system.stub.ListBaseModels(training_pb2.ListBaseModelsRequest(), metadata=system.metadata())
    assert [(model.name, model.max_sequence_length) for model in answer.base_models] == [("tiny", 64), ("gone", 64)]


async def test_the_table_of_metrics_goes_on_where_a_state_left_it(tmp_path):
    table = MetricsTable()
    table.add(metrics_of(1))
    table.write(tmp_path)
    again = MetricsTable.restored(tmp_path)
    again.add(metrics_of(2))
    lines = again.write(tmp_path).read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "disk_full"),
        (ZeroDivisionError("the inside"), "internal_error"),
        (InvalidArgumentError("as it is", code="mine"), "mine"),
    ],
)
def test_what_ends_an_attempt_is_explained_without_the_inside(error, code):
    work = Assignment("p", "ftjob-1", 1, TrainingSpec(base_model="tiny"), None, None, None)
    explained = explain(error, work)
    assert explained.code == code
    assert "the inside" not in explained.message
    assert ("spec.memory.budget" in explained.message) == (code == "out_of_memory")


async def test_what_the_planner_refuses_is_the_jobs_error_word_for_word(system, launcher, wait_until):
    shape = describe(LlamaConfig())
    assert not isinstance(shape, str), shape
    with pytest.raises(ResourceExhaustedError) as caught:
        plan_step(shape, Workload(num_tokens=64, longest_row=64, mean_row=20.0, ranks=Ranks(qkv=24)), card_bytes=1 << 20)
    job = await system.create()
    client = await worker_client(launcher, await attempt_of(launcher, wait_until))
    await client.finish(JobState.FAILED, error=error_fields(explain(caught.value, await client.assignment())))
    await client.close()
    error = (await system.get(job.name)).error
    assert (error.code, error.param, error.message) == ("out_of_memory", "spec.memory.budget", caught.value.message)


async def test_a_validation_taken_up_by_another_process_goes_on(system, wait_until, fake_launcher):
    system.dataprep.ready = False
    async with system.started(lambda _address: fake_launcher):
        job = await system.create()
        await system.wait(job.name, "VALIDATING")
    system.dataprep.ready = True
    async with system.started(lambda _address: fake_launcher) as service:
        await attempt_of(fake_launcher, wait_until)
        assert (await service.jobs.get(system.project, named(job))).epoch == 3
