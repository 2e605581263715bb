"""A fine-tuning job of many short steps, and how far it is."""

from __future__ import annotations

import time

from e2e.system import FAST_SPEC, code_word_rows
from openai import OpenAI

from finery_cli.local.stack import QUICKSTART_MODEL

NUM_STEPS = 20
LONG_SPEC = FAST_SPEC | {
    "batch": {"micro_batch_size": 2, "gradient_accumulation_steps": 1},
    "num_epochs": 4,
    "checkpoint": {"interval_steps": 2},
}
"""20 short optimizer steps over 10 rows."""


def create_job(client: OpenAI, spec: dict[str, object]) -> str:
    file = client.files.create(file=("rows.jsonl", code_word_rows("maple", num_rows=10)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model=QUICKSTART_MODEL, training_file=file.id, extra_body={"spec": spec, "deploy": False}).id


def wait_steps(client: OpenAI, job_id: str, num_steps: int, *, timeout_s: float = 180) -> None:
    deadline_s = time.monotonic() + timeout_s
    while steps_of(client, job_id)[:1] < [num_steps]:
        assert time.monotonic() < deadline_s, f"step {num_steps} was not reached"
        time.sleep(0.2)


def steps_of(client: OpenAI, job_id: str) -> list[int]:
    """Steps reported so far, newest first."""
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return [int(event.data["step"]) for event in events if event.type == "metrics" and isinstance(event.data, dict)]
