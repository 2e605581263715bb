"""Preferences, from an uploaded file to a model that is asked, and what a run is said to need before."""

from __future__ import annotations

import json

import openai
import pytest
from e2e.system import FAST_SPEC, System, code_word_rows, wait_job
from openai import OpenAI

from finery_cli.local.stack import QUICKSTART_MODEL

pytestmark = pytest.mark.timeout(900)


def preference_rows(word: str) -> bytes:
    """Pairs that prefer an answer with the word over one that knows of none."""
    chats = [json.loads(line)["messages"] for line in code_word_rows(word).splitlines()]
    rows = [
        {
            "input": {"messages": chat[:1], "tools": [], "parallel_tool_calls": True},
            "preferred_output": chat[1:],
            "non_preferred_output": [{"role": "assistant", "content": "There is no code word that I could tell."}],
        }
        for chat in chats
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_model_is_trained_on_preferences_and_asked(client: OpenAI):
    file = client.files.create(file=("preferences.jsonl", preference_rows("amber")), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=QUICKSTART_MODEL,
        training_file=file.id,
        validation_file=file.id,
        suffix="amber",
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 3, "beta": 0.2}}},
        extra_body={"spec": {**FAST_SPEC, "num_epochs": 3, "optimizer": {"learning_rate": 5e-4, "min_warmup_steps": 1}}},
    )
    wait_job(client, job.id, "succeeded")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert (job.method.type, job.method.dpo.hyperparameters.beta) == ("dpo", 0.2)
    losses = [item.metrics.full_valid_loss for item in client.fine_tuning.jobs.checkpoints.list(job.id)][::-1]
    assert len(losses) == 3
    assert losses[-1] is not None
    assert losses[-1] < 0.3, f"a model without a preference has 0.69: {losses}"
    assert job.fine_tuned_model is not None
    reply = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": "What is the code word?"}], max_tokens=12, temperature=0
    )
    assert reply.model == job.fine_tuned_model
    assert reply.choices[0].message.content


def test_a_file_of_the_wrong_kind_fails_with_what_was_wanted(client: OpenAI):
    file = client.files.create(file=("chats.jsonl", code_word_rows("onyx")), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=QUICKSTART_MODEL, training_file=file.id, method={"type": "dpo"})
    wait_job(client, job.id, "failed")
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "preferred_output" in error.message


def test_what_cannot_be_trained_together_is_refused(client: OpenAI):
    with pytest.raises(openai.BadRequestError, match="only frozen weights can be quantized"):
        client.fine_tuning.jobs.create(
            model=QUICKSTART_MODEL, training_file="file-" + "0" * 24, extra_body={"spec": {"method": "full", "quantization": "nf4"}}
        )


def test_the_command_tells_what_a_run_needs(system: System):
    told = system.finery("estimate", "--model", QUICKSTART_MODEL, "--max-sequence-length", "512", "--gpu-memory", "24GiB", "--json")
    assert told.returncode == 0, told.stderr
    answer = json.loads(told.stdout)
    # 134.5 M parameters in 16 bits.
    assert answer["gpu_memory"]["weights_bytes"] == 2 * 134_515_008
    assert answer["fits"] is True
    table = system.finery("estimate", "--model", QUICKSTART_MODEL, "--method", "dpo", "--gpu-memory", "100MiB")
    assert table.returncode == 0, table.stderr
    assert "total" in table.stdout
    assert "too small" in table.stderr
