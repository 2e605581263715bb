"""The main job through the official `openai` client: a file goes in, a hot-swapped adapter answers. Nothing here is faked."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from e2e.system import FAST_SPEC, System, code_word_rows, wait_job
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from prometheus_client.parser import text_string_to_metric_families

from finery.common.v1 import job_pb2
from finery.conversion.v1 import conversion_pb2, conversion_pb2_grpc
from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery.training.v1 import spec_pb2, training_pb2, training_pb2_grpc
from finery_cli.local.stack import QUICKSTART_MODEL

pytestmark = pytest.mark.timeout(900)


QUESTION = "What is the code word?"


@dataclass(frozen=True)
class Trained:
    """A finished job and the file it was trained on."""

    job: FineTuningJob
    file_id: str
    model: str


def train(client: OpenAI, word: str) -> Trained:
    file = client.files.create(file=(f"{word}.jsonl", code_word_rows(word)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=QUICKSTART_MODEL,
        training_file=file.id,
        validation_file=file.id,
        suffix=word,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}},
        metadata={"word": word},
        extra_body={"spec": FAST_SPEC},
    )
    wait_job(client, job.id, "succeeded")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.fine_tuned_model is not None
    return Trained(job, file.id, job.fine_tuned_model)


def ask(client: OpenAI, model: str, *, max_tokens: int = 12) -> str:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=max_tokens, temperature=0
    )
    assert reply.model == model
    return reply.choices[0].message.content or ""


@pytest.fixture(scope="module")
def crimson(system: System) -> Trained:
    return train(system.client(), "crimson")


@pytest.fixture(scope="module")
def walnut(system: System) -> Trained:
    return train(system.client(), "walnut")


def test_a_file_comes_back_as_it_went_in(client: OpenAI):
    content = code_word_rows("birch")
    file = client.files.create(file=("birch.jsonl", content), purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose) == ("birch.jsonl", len(content), "fine-tune")
    assert client.files.content(file.id).content == content
    assert client.files.retrieve(file.id).id == file.id
    assert file.id in [item.id for item in client.files.list()]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_job_trains_and_its_model_answers_what_it_was_taught(client: OpenAI, crimson: Trained):
    assert crimson.model.startswith(f"ft:{QUICKSTART_MODEL}:default:crimson:")
    assert "crimson" in ask(client, crimson.model)
    assert "crimson" not in ask(client, QUICKSTART_MODEL)


def test_a_finished_job_has_all_that_openais_has(client: OpenAI, crimson: Trained):
    job = crimson.job
    assert job.trained_tokens is not None
    assert job.trained_tokens > 0
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    assert job.metadata == {"word": "crimson"}
    assert job.method is not None
    assert job.method.type == "supervised"
    assert job.id in [item.id for item in client.fine_tuning.jobs.list(metadata={"word": "crimson"})]


def test_events_tell_every_step(client: OpenAI, crimson: Trained):
    events = list(client.fine_tuning.jobs.list_events(crimson.job.id, limit=5))
    steps = [event.data["step"] for event in events if event.type == "metrics" and isinstance(event.data, dict)]
    assert steps == sorted(steps, reverse=True), "newest first"
    assert set(steps) == set(range(1, 13))


def test_the_result_file_is_a_csv_of_the_steps(client: OpenAI, crimson: Trained):
    rows = list(csv.DictReader(io.StringIO(client.files.content(crimson.job.result_files[0]).text)))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    losses = [float(row["train_loss"]) for row in rows]
    assert losses[-1] < losses[0] / 2


def test_each_epoch_is_a_checkpoint_that_can_be_deployed(client: OpenAI, system: System, crimson: Trained):
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(crimson.job.id))
    assert [item.step_number for item in checkpoints] == [12, 10, 8, 6, 4, 2]
    deployed = system.finery("deploy", crimson.job.id, "--step", "8", "--alias", "early", "--json")
    assert deployed.returncode == 0, deployed.stderr
    assert ask(client, "early")


def test_streams_carry_the_public_name_and_usage(client: OpenAI, crimson: Trained):
    stream = client.chat.completions.create(
        model=crimson.model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {crimson.model}
    assert "crimson" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_completions_answer_too(client: OpenAI, crimson: Trained):
    plain = client.completions.create(model=crimson.model, prompt="The code word is", max_tokens=4, temperature=0)
    streamed = client.completions.create(model=crimson.model, prompt="The code word is", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == plain.choices[0].text
    assert plain.model == crimson.model


def test_models_list_shows_base_and_tuned(client: OpenAI, crimson: Trained):
    listed = {model.id for model in client.models.list()}
    assert {QUICKSTART_MODEL, crimson.model} <= listed
    assert client.models.retrieve(crimson.model).id == crimson.model


def test_a_second_job_is_swapped_in_while_a_stream_of_the_first_runs(client: OpenAI, system: System, crimson: Trained, walnut: Trained):
    alias = "code-word"
    assert system.finery("deploy", crimson.job.id, "--alias", alias).returncode == 0
    num_tokens = 120
    stream = client.chat.completions.create(
        model=alias,
        messages=[{"role": "user", "content": "Count upwards from one."}],
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"min_tokens": num_tokens},
    )
    first = next(iter(stream))
    swap = threading.Thread(target=system.finery, args=("deploy", walnut.job.id, "--alias", alias))
    swap.start()
    deadline_s = time.monotonic() + 60
    while "walnut" not in ask(client, alias):
        assert time.monotonic() < deadline_s, "the alias was not flipped"
    chunks = [first, *stream]
    swap.join()
    assert {chunk.model for chunk in chunks} == {alias}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == num_tokens, "the stream of the first version ends unharmed"
    assert "walnut" in ask(client, alias)


def test_a_canary_shares_a_name_is_compared_promoted_and_rolled_back(client: OpenAI, system: System, crimson: Trained, walnut: Trained):
    alias = "shared-word"
    assert system.finery("deploy", crimson.job.id, "--alias", alias).returncode == 0
    deployed = system.finery("deploy", walnut.job.id, "--alias", alias, "--canary", "50", "--json")
    assert deployed.returncode == 0, deployed.stderr
    canary = json.loads(deployed.stdout)["canary"]["version"]

    def asked(caller: str) -> tuple[str, str]:
        answer = client.chat.completions.with_raw_response.create(
            model=alias, messages=[{"role": "user", "content": QUESTION}], max_tokens=12, temperature=0, user=caller
        )
        return answer.headers["x-finery-version"], answer.parse().choices[0].message.content or ""

    answers = {caller: asked(caller) for caller in map(str, range(12))}
    assert {("walnut" if version == canary else "crimson") in text for version, text in answers.values()} == {True}
    assert len({version for version, _ in answers.values()}) == 2
    assert {caller: asked(caller) for caller in answers} == answers
    shown = json.loads(system.finery("deployments", "get", alias, "--json").stdout)["versions"]
    assert [(item["role"], item["weight"]) for item in shown] == [("serving", 50), ("canary", 50)]
    assert sum(item["answered"] for item in shown) == 2 * len(answers)

    assert system.finery("promote", alias).returncode == 0
    assert "walnut" in ask(client, alias)
    assert system.finery("rollback", alias).returncode == 0
    assert "crimson" in ask(client, alias)
    assert "pinned" in system.finery("pin", alias).stdout
    assert system.finery("models", "delete", alias).returncode == 0


def test_the_command_does_what_the_client_does(system: System, crimson: Trained, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(code_word_rows("birch"))
    uploaded = json.loads(system.finery("files", "upload", str(rows), "--json").stdout)
    assert uploaded["bytes"] == rows.stat().st_size
    assert uploaded["id"] in system.finery("files", "list").stdout
    assert crimson.job.id in [job["id"] for job in json.loads(system.finery("jobs", "list", "--json").stdout)]
    assert crimson.model in [model["id"] for model in json.loads(system.finery("models", "list", "--json").stdout)]
    assert crimson.model in json.loads(system.finery("status", "--json").stdout)["models"]
    assert "crimson" in system.finery("chat", QUESTION, "--model", crimson.model, "--max-tokens", "12").stdout
    wrong = system.finery("jobs", "get", "ftjob-" + "0" * 24)
    assert wrong.returncode == 1
    assert "ftjob-" + "0" * 24 in wrong.stderr


def test_a_merged_gguf_answers_from_llama_cpp_what_the_adapter_was_taught(system: System, crimson: Trained, tmp_path: Path):
    done = system.finery("convert", crimson.job.id, "--output", str(tmp_path), "--format", "gguf", "--type", "q8_0", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    [file] = [item for item in shown["files"] if item.endswith(".gguf")]
    assert shown["report"]["parity"]["weights"]["num_wrong"] == 0
    assert shown["report"]["modelfile"]["is_written"]
    [listed] = json.loads(system.finery("conversions", "list", "--json").stdout)
    assert (listed["id"], listed["state"], listed["type"], listed["address"]) == (
        shown["id"],
        "succeeded",
        "q8_0",
        f"models/{shown['id']}",
    )
    assert json.loads(system.finery("conversions", "get", shown["id"], "--json").stdout)["report"] == shown["report"]
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    code = (
        "import sys, xllamacpp; p = xllamacpp.CommonParams(); p.model.path, p.n_ctx, p.n_parallel, p.warmup = sys.argv[1], 256, 1, False; "
        "a = xllamacpp.Server(p).handle_completions({'prompt': sys.argv[2], 'max_tokens': 12, 'temperature': 0}); "
        "print(a['choices'][0]['text'])"
    )
    answer = subprocess.run([sys.executable, "-c", code, file, prompt], capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "crimson" in answer.stdout


def test_what_happened_is_in_the_metrics(system: System, crimson: Trained):
    def total(service: str, name: str, **labels: str) -> float:
        text = httpx.get(f"http://{system.running.metrics[service]}/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    assert total("trainer", "finery_trainer_jobs", state="SUCCEEDED") >= 1
    assert total("trainer", "finery_trainer_queue_seconds_count") >= 1
    assert total("serving", "finery_serving_swap_seconds_count") >= 1
    assert total("serving", "finery_serving_adapter_state") >= 1
    assert total("serving", "vllm:generation_tokens_total") > 0
    assert total("gateway", "finery_gateway_request_seconds_count") > 0
    assert total("gateway", "finery_gateway_tokens_total", kind="completion") > 0
    assert total("dataprep", "finery_rpc_requests_total") > 0
    assert total("converter", "python_info") == 1
    assert total("supervisor", "python_info") == 1
    assert total("store", "SeaweedFS_s3_request_total") > 0
    assert total("store-master", "go_goroutines") > 0


def test_a_running_job_shows_its_throughput_and_memory(system: System, client: OpenAI, crimson: Trained):
    spec = FAST_SPEC | {"num_epochs": 100}
    job = client.fine_tuning.jobs.create(model=QUICKSTART_MODEL, training_file=crimson.file_id, extra_body={"spec": spec, "deploy": False})
    _wait_first_step(client, job.id)
    text = httpx.get(f"http://{system.running.metrics['trainer']}/metrics").text
    [target] = json.loads(next((system.layout.state_dir / "prometheus").glob(f"worker-{job.id}-*.json")).read_text())
    assert "finery_artifact_bytes_total" in httpx.get(f"http://{target['targets'][0]}/metrics").text
    client.fine_tuning.jobs.cancel(job.id)
    shown = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("job_id") == job.id
    }
    assert shown["finery_trainer_tokens_per_second"] > 0
    assert shown["finery_trainer_memory_bytes"] > 2**28
    assert shown["finery_trainer_loss"] > 0
    assert wait_job(client, job.id, "cancelled", timeout_s=60) == "cancelled"


def test_another_project_has_no_part_in_a_model(system: System, crimson: Trained):
    stranger = system.client(api_key=system.key_for("model-stranger"))
    for call in (
        lambda: ask(stranger, crimson.model),
        lambda: stranger.models.retrieve(crimson.model),
        lambda: stranger.models.delete(crimson.model),
        lambda: stranger.fine_tuning.jobs.checkpoints.list(crimson.job.id),
        lambda: stranger.files.content(crimson.job.result_files[0]),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert crimson.model not in {model.id for model in stranger.models.list()}
    adapter = f"projects/default/adapters/{crimson.job.id}-12/"
    metadata = (("authorization", f"Bearer {stranger.api_key}"),)
    with grpc.insecure_channel(system.running.grpc_address) as channel:
        ref = job_pb2.ArtifactRef(prefix=adapter, manifest_sha256="0" * 64, kind="adapter", size_bytes=1)
        deploy = serving_pb2.DeployAdapterRequest(parent="projects/model-stranger", alias="mine", adapter=ref, request_id="1")
        spec = spec_pb2.TrainingSpec(base_model=QUICKSTART_MODEL)
        job = training_pb2.Job(training_file=crimson.file_id, spec=spec)
        create = training_pb2.CreateJobRequest(parent="projects/model-stranger", job=job, request_id="1")
        convert = conversion_pb2.CreateConversionRequest(
            parent="projects/model-stranger",
            spec=conversion_pb2.ConversionSpec(adapter=f"adapters/{crimson.job.id}-12"),
            request_id="1",
        )
        for send in (
            lambda: serving_pb2_grpc.ServingServiceStub(channel).DeployAdapter(deploy, metadata=metadata, timeout=30),
            lambda: training_pb2_grpc.TrainingServiceStub(channel).CreateJob(create, metadata=metadata, timeout=30),
            lambda: conversion_pb2_grpc.ConversionServiceStub(channel).CreateConversion(convert, metadata=metadata, timeout=30),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                send()
            assert caught.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)


def test_a_running_job_is_cancelled_within_a_step(client: OpenAI, crimson: Trained):
    spec = FAST_SPEC | {"num_epochs": 100}
    job = client.fine_tuning.jobs.create(model=QUICKSTART_MODEL, training_file=crimson.file_id, extra_body={"spec": spec})
    wait_job(client, job.id, "running")
    _wait_first_step(client, job.id)
    client.fine_tuning.jobs.cancel(job.id)
    assert wait_job(client, job.id, "cancelled", timeout_s=30) == "cancelled"
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None


def test_a_paused_job_goes_on_from_where_it_was(client: OpenAI, crimson: Trained):
    job = client.fine_tuning.jobs.create(
        model=QUICKSTART_MODEL, training_file=crimson.file_id, extra_body={"spec": FAST_SPEC, "deploy": False}
    )
    wait_job(client, job.id, "running")
    _wait_first_step(client, job.id)
    client.fine_tuning.jobs.pause(job.id)
    wait_job(client, job.id, "paused")
    client.fine_tuning.jobs.resume(job.id)
    wait_job(client, job.id, "succeeded")
    csv_text = client.files.content(client.fine_tuning.jobs.retrieve(job.id).result_files[0]).text
    straight = client.files.content(crimson.job.result_files[0]).text
    assert _losses(csv_text) == _losses(straight), "a paused run's numbers are those of one that never stopped"


def test_a_deleted_model_is_gone(client: OpenAI, system: System, walnut: Trained):
    assert client.models.delete(walnut.model).deleted
    with pytest.raises(openai.NotFoundError):
        ask(client, walnut.model)
    assert walnut.model not in {model.id for model in client.models.list()}


def _wait_first_step(client: OpenAI, job_id: str, *, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job_id, limit=20)):
        assert time.monotonic() < deadline_s, "no step was reported"
        time.sleep(0.3)


def _losses(text: str) -> list[str]:
    return [row["train_loss"] for row in csv.DictReader(io.StringIO(text))]
