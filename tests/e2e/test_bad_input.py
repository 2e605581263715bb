"""Bad input through the real system: a clear error that says what was got, wanted and to be done, and nothing is lost."""

from __future__ import annotations

import json

import openai
import pytest
from e2e.system import System, code_word_rows, wait_job
from openai import OpenAI

from finery_cli.local.stack import QUICKSTART_MODEL

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def file_id(system: System) -> str:
    return system.client().files.create(file=("rows.jsonl", code_word_rows("birch")), purpose="fine-tune").id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra_body": {"spec": {"learning_rate_typo": 1}}}, ["learning_rate_typo", "unknown field"]),
        ({"extra_body": {"frobnicate": 1}}, ["frobnicate"]),
        ({"extra_body": {"spec": {"num_epochs": "many"}}}, ["num_epochs", "many"]),
        ({"extra_body": {"spec": {"optimizer": {"learning_rate": 0}}}}, ["learning_rate", "greater than 0"]),
        ({"model": "no-such-model"}, ["no-such-model", QUICKSTART_MODEL]),
        ({"suffix": "a/b"}, ["suffix", "a/b"]),
        ({"training_file": "file-" + "0" * 24}, ["file-" + "0" * 24]),
        ({"method": {"type": "reinforcement"}}, ["reinforcement", "supervised", "dpo"]),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, ["integrations"]),
    ],
    ids=[
        "unknown-spec-field",
        "unknown-field",
        "wrong-type",
        "learning-rate-0",
        "unknown-base",
        "suffix-slash",
        "unknown-file",
        "reinforcement",
        "wandb",
    ],
)
def test_a_wrong_job_is_refused_with_what_was_got_and_wanted(client: OpenAI, file_id: str, changes: dict[str, object], words: list[str]):
    body = {"model": QUICKSTART_MODEL, "training_file": file_id} | changes
    with pytest.raises(openai.APIStatusError) as caught:
        client.fine_tuning.jobs.create(**body)
    assert caught.value.status_code in (400, 404)
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"question,answer\na,b\n" * 10, ["line 1", "JSON"]),
        (code_word_rows("birch", num_rows=1), ["1 row"]),
        (code_word_rows("birch") + b'{"messages": [{"role": "user", "content": "x"}]}\n', ["line 17", "assistant"]),
        (
            code_word_rows("birch")
            + json.dumps({"messages": [{"role": "user", "content": "long " * 4000}, {"role": "assistant", "content": "x"}]}).encode(),
            ["line 17", "2048"],
        ),
    ],
    ids=["not-jsonl", "one-row", "no-assistant", "over-length"],
)
def test_wrong_data_fails_the_job_and_names_the_line(client: OpenAI, content: bytes, words: list[str]):
    file = client.files.create(file=("bad.jsonl", content), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=QUICKSTART_MODEL, training_file=file.id)
    wait_job(client, job.id, "failed", timeout_s=180)
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None
    for word in words:
        assert word in error.message
    assert client.files.content(file.id).content == content, "the file is still there"


def test_an_empty_file_is_refused(client: OpenAI):
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.files.create(file=("empty.jsonl", b""), purpose="fine-tune")


def test_a_job_on_a_deleted_file_is_refused(client: OpenAI):
    file = client.files.create(file=("gone.jsonl", code_word_rows("birch")), purpose="fine-tune")
    client.files.delete(file.id)
    with pytest.raises(openai.APIStatusError) as caught:
        client.fine_tuning.jobs.create(model=QUICKSTART_MODEL, training_file=file.id)
    assert file.id in caught.value.message


def test_a_wrong_key_is_refused(system: System):
    with pytest.raises(openai.AuthenticationError):
        system.client(api_key="sk-finery-wrong").models.list()


def test_one_project_never_sees_anothers_files_jobs_or_models(system: System, client: OpenAI, file_id: str):
    job = client.fine_tuning.jobs.create(
        model=QUICKSTART_MODEL, training_file=file_id, extra_body={"spec": {"max_steps": 1}, "deploy": False}
    )
    stranger = system.client(api_key=system.key_for("stranger"))
    for call in (
        lambda: stranger.files.retrieve(file_id),
        lambda: stranger.files.content(file_id),
        lambda: stranger.files.delete(file_id),
        lambda: stranger.fine_tuning.jobs.retrieve(job.id),
        lambda: stranger.fine_tuning.jobs.cancel(job.id),
        lambda: stranger.fine_tuning.jobs.create(model=QUICKSTART_MODEL, training_file=file_id),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            call()
        assert caught.value.status_code in (400, 404)
    assert list(stranger.files.list()) == []
    assert list(stranger.fine_tuning.jobs.list()) == []
    client.fine_tuning.jobs.cancel(job.id)


def test_the_same_state_directory_is_not_started_twice(system: System):
    again = system.finery("up")
    assert again.returncode == 1
    assert "already running" in again.stderr
