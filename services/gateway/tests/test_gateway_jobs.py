"""Fine-tuning jobs through the official client."""

import asyncio

import httpx
import openai
import pytest

from finery.common.v1 import job_pb2
from finery.training.v1 import training_pb2
from finery_common.spec import DpoLossType, MethodType, TrainingSpec

BASE = "SmolLM2-135M-Instruct"


async def _create(client, file_id, **changes):
    return await client.fine_tuning.jobs.create(**({"model": BASE, "training_file": file_id} | changes))


async def test_a_job_is_created_with_our_defaults_in_openais_terms(client, world):
    file_id = await world.upload()
    job = await _create(client, file_id, suffix="topics", seed=7, metadata={"team": "a"}, validation_file=file_id)
    assert (job.object, job.status, job.model, job.training_file, job.validation_file) == (
        "fine_tuning.job",
        "queued",
        BASE,
        file_id,
        file_id,
    )
    assert (job.seed, job.metadata, job.organization_id, job.result_files, job.fine_tuned_model) == (
        7,
        {"team": "a"},
        world.project,
        [],
        None,
    )
    assert job.hyperparameters.model_dump() == {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert job.method is not None
    assert job.method.type == "supervised"
    sent = world.training.job(job.id)
    assert (sent.suffix, sent.spec.seed, sent.HasField("deploy")) == ("topics", 7, False)
    assert await client.fine_tuning.jobs.retrieve(job.id) == job


@pytest.mark.parametrize(
    ("batch_size", "micro", "accumulation"), [(8, 2, 4), (1, 1, 1), (7, 1, 7), (2, 2, 1), (2048, 2, 1024), ("auto", 2, 4)]
)
@pytest.mark.parametrize("deprecated", [True, False])
async def test_hyperparameters_become_the_spec(client, world, batch_size, micro, accumulation, deprecated):
    given = {"n_epochs": 3, "batch_size": batch_size, "learning_rate_multiplier": 0.5}
    changes = {"hyperparameters": given} if deprecated else {"method": {"type": "supervised", "supervised": {"hyperparameters": given}}}
    job = await _create(client, await world.upload(), **changes)
    spec = world.training.job(job.id).spec
    assert (spec.num_epochs, spec.batch.micro_batch_size, spec.batch.gradient_accumulation_steps) == (3, micro, accumulation)
    assert spec.optimizer.learning_rate == 1e-4
    assert job.hyperparameters.batch_size == micro * accumulation
    assert job.hyperparameters.learning_rate_multiplier == 0.5


async def test_preferences_are_a_method_with_a_beta(client, world):
    given = {"n_epochs": 2, "batch_size": 4, "beta": 0.3, "learning_rate_multiplier": 0.5}
    extra = {"spec": {"dpo": {"loss_type": "ipo"}}}
    method = {"type": "dpo", "dpo": {"hyperparameters": given}}
    job = await _create(client, await world.upload(), method=method, extra_body=extra)
    spec = TrainingSpec.from_proto(world.training.job(job.id).spec)
    assert (spec.method, spec.num_epochs, spec.optimizer.learning_rate) == (MethodType.DPO, 2, 2.5e-6)
    assert (spec.dpo.beta, spec.dpo.loss_type) == (0.3, DpoLossType.IPO)
    assert job.method.model_dump(exclude_none=True) == method
    assert await client.fine_tuning.jobs.retrieve(job.id) == job


@pytest.mark.parametrize("method", [{"type": "dpo"}, {"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto", "n_epochs": "auto"}}}])
async def test_auto_of_preferences_is_the_specs_default(client, world, method):
    job = await _create(client, await world.upload(), method=method)
    spec = TrainingSpec.from_proto(world.training.job(job.id).spec)
    assert spec == TrainingSpec(base_model=BASE, method=MethodType.DPO)
    assert job.method.dpo.hyperparameters.beta == 0.1


async def test_fields_of_our_spec_and_deploy_go_through_extra_body(client, world):
    extra = {"spec": {"lora": {"rank": 4}, "max_steps": 9, "base_model": BASE, "num_epochs": 2}, "deploy": False}
    job = await _create(client, await world.upload(), hyperparameters={"n_epochs": 2}, extra_body=extra)
    sent = world.training.job(job.id)
    assert (sent.spec.lora.rank, sent.spec.max_steps, sent.deploy) == (4, 9, False)
    assert job.model_extra["spec"]["lora"]["rank"] == 4


@pytest.mark.parametrize(
    ("changes", "words", "param"),
    [
        ({"extra_body": {"frobnicate": 1}}, ["frobnicate", "unknown field"], "frobnicate"),
        ({"extra_body": {"spec": {"learning_rate_typo": 1}}}, ["spec.learning_rate_typo", "unknown field"], "spec.learning_rate_typo"),
        ({"extra_body": {"spec": {"num_epochs": "many"}}}, ["spec.num_epochs", "many"], "spec.num_epochs"),
        (
            {"extra_body": {"spec": {"optimizer": {"learning_rate": 0}}}},
            ["learning_rate", "greater than 0"],
            "spec.optimizer.learning_rate",
        ),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, ["learning_rate_multiplier", "greater than 0"], None),
        ({"hyperparameters": {"n_epochs": "three"}}, ["n_epochs", "three"], None),
        ({"hyperparameters": {"batch_size": 2049}}, ["gradient_accumulation_steps", "2049"], None),
        ({"hyperparameters": {"n_epochs": 2}, "extra_body": {"spec": {"num_epochs": 3}}}, ["spec.num_epochs", "say it once"], None),
        ({"hyperparameters": {"batch_size": 4}, "extra_body": {"spec": {"batch": {"micro_batch_size": 4}}}}, ["spec.batch"], "spec.batch"),
        ({"seed": 1, "extra_body": {"spec": {"seed": 2}}}, ["spec.seed", "say it once"], "spec.seed"),
        ({"extra_body": {"spec": {"base_model": "other"}}}, ["spec.base_model"], "spec.base_model"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 2.0}, "extra_body": {"spec": {"method": "nonsense"}}},
            ["spec.method", "nonsense"],
            "spec.method",
        ),
        (
            {"hyperparameters": {"learning_rate_multiplier": 2.0}, "extra_body": {"spec": {"method": ["lora"]}}},
            ["spec.method"],
            "spec.method",
        ),
        ({"model": "no-such-model"}, ["no-such-model", BASE], "base_model"),
        ({"suffix": "a/b"}, ["suffix", "a/b"], "suffix"),
        ({"suffix": "x" * 65}, ["suffix"], "suffix"),
        ({"metadata": {f"k{n}": "v" for n in range(17)}}, ["metadata", "16"], "metadata"),
        ({"method": {"type": "reinforcement"}}, ["reinforcement", "supervised", "dpo"], "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, ["method.dpo", "supervised"], "method.dpo"),
        ({"method": {"type": "dpo", "supervised": {}}}, ["method.supervised", "dpo"], "method.supervised"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, ["beta", "greater than 0"], None),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 101.0}}}}, ["spec.dpo.beta", "101"], "spec.dpo.beta"),
        ({"method": {"type": "dpo"}, "extra_body": {"spec": {"method": "lora"}}}, ["spec.method", "say it once"], "spec.method"),
        ({"method": {"type": "supervised"}, "extra_body": {"spec": {"method": "dpo"}}}, ["spec.method", "say it once"], "spec.method"),
        ({"extra_body": {"spec": {"method": "full", "quantization": "nf4"}}}, ["only frozen weights"], "spec.quantization"),
        (
            {
                "hyperparameters": {"n_epochs": 2},
                "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 3}}},
            },
            ["said twice", "method.dpo.hyperparameters"],
            "hyperparameters",
        ),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, ["integrations"], "integrations"),
    ],
)
async def test_a_wrong_job_gets_a_400_that_says_what_was_wanted(client, world, changes, words, param):
    with pytest.raises(openai.BadRequestError) as caught:
        await _create(client, await world.upload(), **changes)
    for word in words:
        assert word in caught.value.message
    if param is not None:
        assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert world.training.jobs == {}


async def test_a_job_on_a_missing_deleted_or_foreign_file_is_refused(client, stranger, world):
    file_id = await world.upload()
    with pytest.raises(openai.NotFoundError, match=file_id):
        await _create(stranger, file_id)
    await client.files.delete(file_id)
    with pytest.raises(openai.NotFoundError, match=file_id) as caught:
        await _create(client, file_id)
    assert caught.value.param == "training_file"
    with pytest.raises(openai.NotFoundError) as caught:
        await _create(client, await world.upload(), validation_file=file_id)
    assert caught.value.param == "validation_file"


async def test_jobs_are_listed_in_pages_and_by_metadata(client, stranger, world):
    file_id = await world.upload()
    made = [(await _create(client, file_id, metadata={"n": str(n)})).id for n in range(3)]
    assert [job.id async for job in client.fine_tuning.jobs.list(limit=2)] == made[::-1]
    assert [job.id async for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [made[1]]
    assert [job.id for job in (await client.fine_tuning.jobs.list(after=made[1])).data] == [made[0]]
    assert [job.id async for job in stranger.fine_tuning.jobs.list()] == []


async def test_a_job_can_be_paused_resumed_and_cancelled(client, world):
    job = await _create(client, await world.upload())
    assert (await client.fine_tuning.jobs.pause(job.id)).status == "paused"
    assert (await client.fine_tuning.jobs.resume(job.id)).status == "queued"
    assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"


async def test_another_projects_job_is_not_there(client, stranger, world):
    job = await _create(client, await world.upload())
    jobs = stranger.fine_tuning.jobs
    for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError):
            await call(job.id)
    assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "queued"


async def test_a_succeeded_job_names_its_model_and_its_results(client, stranger, world):
    job_id = (await _create(client, await world.upload(), suffix="topics")).id
    job = world.training.job(job_id)
    with world.gateway.store.writer(f"projects/{world.project}/runs/{job_id}/metrics/", kind="metrics") as writer:
        writer.put_bytes("metrics.csv", data=b"step,loss\n1,2.5\n")
        ref = writer.publish(made_from={}, spec={}, attempt="1")
    job.state = job_pb2.JOB_STATE_SUCCEEDED
    job.metrics_file.CopyFrom(job_pb2.ArtifactRef(**ref.model_dump()))
    job.metrics.num_trained_tokens = 1234
    job.deployment.state = training_pb2.DEPLOYMENT_STATE_READY
    shown = await client.fine_tuning.jobs.retrieve(job_id)
    assert shown.status == "succeeded"
    assert shown.fine_tuned_model == f"ft:{BASE}:{world.project}:topics:{job_id.removeprefix('ftjob-')}"
    assert shown.trained_tokens == 1234
    assert shown.model_extra["deployment"]["state"] == "ready"
    [results] = shown.result_files
    assert (await client.files.content(results)).text == "step,loss\n1,2.5\n"
    assert (await client.files.retrieve(results)).purpose == "fine-tune-results"
    with pytest.raises(openai.ConflictError, match=job_id):
        await client.files.delete(results)
    with pytest.raises(openai.NotFoundError):
        await stranger.files.content(results)


async def test_a_failed_job_says_why_by_line(client, world):
    job_id = (await _create(client, await world.upload())).id
    job = world.training.job(job_id)
    job.state = job_pb2.JOB_STATE_FAILED
    violation = job_pb2.Violation(field="training_file", description="not JSON", line=7)
    job.error.CopyFrom(job_pb2.JobError(code="invalid_training_file", message="line 7: not JSON", violations=[violation]))
    shown = await client.fine_tuning.jobs.retrieve(job_id)
    assert shown.error is not None
    assert (shown.error.code, shown.error.message) == ("invalid_training_file", "line 7: not JSON")
    assert shown.error.model_extra["violations"][0]["line"] == 7
    assert shown.fine_tuned_model is None


async def test_events_come_newest_first_with_openais_metric_names(client, world):
    job_id = (await _create(client, await world.upload())).id
    job = world.training.job(job_id)
    events = [job_pb2.JobEvent(sequence=n, type="state", message=f"event {n}", level=job_pb2.EVENT_LEVEL_INFO) for n in range(1, 5)]
    step = job_pb2.JobEvent(sequence=5, type="step", message="step 1")
    step.data.update({"step": 1, "num_steps": 10, "loss": 2.5, "tokens_per_second": 100.0})
    world.training.events[job.name] = [*events, step]
    for event in world.training.events[job.name]:
        event.create_time.CopyFrom(job.create_time)
    shown = [event async for event in client.fine_tuning.jobs.list_events(job_id, limit=2)]
    assert [event.message for event in shown] == ["step 1", "event 4", "event 3", "event 2", "event 1"]
    assert shown[0].type == "metrics"
    assert {"step": 1, "total_steps": 10, "train_loss": 2.5, "tokens_per_second": 100}.items() <= shown[0].data.items()
    with pytest.raises(openai.BadRequestError, match="after"):
        await client.fine_tuning.jobs.list_events(job_id, after="nonsense")


async def test_checkpoints_carry_the_name_they_can_be_deployed_under(client, world):
    job_id = (await _create(client, await world.upload())).id
    job = world.training.job(job_id)
    checkpoint = training_pb2.Checkpoint(name=f"{job.name}/checkpoints/8", step=8, alias="ft:b:p::x:ckpt-step-8")
    checkpoint.adapter.prefix = f"projects/{world.project}/adapters/{job_id}-8/"
    checkpoint.metrics.loss = 1.5
    checkpoint.create_time.CopyFrom(job.create_time)
    world.training.checkpoints[job.name] = [checkpoint]
    [shown] = [item async for item in client.fine_tuning.jobs.checkpoints.list(job_id)]
    assert (shown.step_number, shown.fine_tuned_model_checkpoint, shown.metrics.train_loss) == (8, "ft:b:p::x:ckpt-step-8", 1.5)


async def test_the_client_may_repeat_a_create_whose_answer_was_lost(world):
    file_id = await world.upload()
    world.training.answers_lost = 1
    async with world.client(max_retries=2) as client:
        job = await _create(client, file_id)
    assert [name.rsplit("/", 1)[-1] for name in world.training.jobs] == [job.id]


async def test_the_same_body_without_a_retry_count_is_another_job(client, world):
    file_id = await world.upload()
    assert (await _create(client, file_id)).id != (await _create(client, file_id)).id


async def test_a_retry_of_another_body_is_another_job(client, world):
    file_id = await world.upload()
    first = await _create(client, file_id, suffix="a")
    again = await _create(client, file_id, suffix="a", extra_headers={"x-stainless-retry-count": "1"})
    other = await _create(client, file_id, suffix="b", extra_headers={"x-stainless-retry-count": "1"})
    assert again.id == first.id
    assert other.id != first.id


async def test_an_idempotency_key_names_one_job_of_one_project(client, stranger, world):
    key = {"idempotency-key": "same"}
    file_id = await world.upload()
    made = await asyncio.gather(*(_create(client, file_id, extra_headers=key) for _ in range(5)))
    assert len({job.id for job in made}) == 1
    with pytest.raises(openai.ConflictError, match="another body"):
        await _create(client, file_id, suffix="other", extra_headers=key)
    theirs = await stranger.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune")
    assert (await _create(stranger, theirs.id, extra_headers=key)).id != made[0].id


async def test_a_refused_create_leaves_its_key_free_for_a_corrected_body(client, world):
    key = {"idempotency-key": "k"}
    file_id = await world.upload()
    with pytest.raises(openai.BadRequestError):
        await _create(client, file_id, model="no-such-model", extra_headers=key)
    assert (await _create(client, file_id, extra_headers=key)).status == "queued"


async def test_a_body_over_the_limit_gets_413_and_broken_json_400(world):
    headers = {"authorization": f"Bearer {world.api_key}", "content-type": "application/json"}

    async def endless():
        for _ in range(200):
            yield b"x" * 1000

    async with httpx.AsyncClient(base_url=world.url, headers=headers) as plain:
        for content in (b"x" * 100_001, endless()):
            answer = await plain.post("/v1/fine_tuning/jobs", content=content)
            assert answer.status_code == 413
            assert "100000" in answer.json()["error"]["message"]
        answer = await plain.post("/v1/fine_tuning/jobs", content=b"{")
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]
