"""The main job from end to end on this machine, on real data: does fine-tuning help, and by how much?

Owns the order of the steps and what is shown. The data and the judging are `quickstart_data`'s, the system is `local.stack`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import openai
from openai import OpenAI
from rich.progress import track
from rich.table import Table

from finery_cli import quickstart_data
from finery_cli.client import Gateway
from finery_cli.local.layout import Layout, RunningStack, find_one
from finery_cli.local.stack import QUICKSTART_MODEL, Stack
from finery_cli.output import err, out
from finery_cli.watch import watch_job
from finery_common.errors import FailedPreconditionError, UnavailableError

SHOWN_ROWS = 12
CONCURRENCY = 8
SERVED_S = 300.0


@dataclass(frozen=True)
class Judged:
    """What both models answered to the held-out rows."""

    rows: Sequence[quickstart_data.Row]
    base_answers: Sequence[str]
    tuned_answers: Sequence[str]


def run_quickstart(layout: Layout, *, http_port: int, grpc_port: int) -> bool:
    """Runs the main job; True where the tuned model beats the base by more than the 95% interval of the difference."""
    started_s = time.monotonic()
    with _system(layout, http_port=http_port, grpc_port=grpc_port):
        client = Gateway.connect(layout.state_dir).openai
        train_rows, held_out_rows = quickstart_data.split(quickstart_data.load_rows(find_one("chatterbot-corpus")))
        model, job_id = _train(client, train_rows)
        _wait_served(client, QUICKSTART_MODEL)
        _wait_served(client, model)
        judged = _judge(client, held_out_rows, tuned_model=model)
    better = _report(judged, model=model)
    _say_how_to_go_on(layout, model=model, job_id=job_id, http_port=http_port)
    err.print(f"[dim]done in {time.monotonic() - started_s:.0f} s[/]")
    return better


@contextmanager
def _system(layout: Layout, *, http_port: int, grpc_port: int) -> Iterator[RunningStack]:
    running = layout.running()
    if running is not None:
        err.print(f"[dim]using the system that runs already at {running.http_url}[/]")
        yield running
        return
    with Stack(layout, http_port=http_port, grpc_port=grpc_port, say=_say).running() as started:
        yield started


def _train(client: OpenAI, rows: Sequence[quickstart_data.Row]) -> tuple[str, str]:
    _say(f"uploading {len(rows)} training rows: questions, each with the topic it belongs to")
    file = client.files.create(file=("topics.jsonl", quickstart_data.to_jsonl(rows)), purpose="fine-tune")
    _say(f"fine-tuning {QUICKSTART_MODEL} with LoRA (vLLM starts meanwhile)")
    job = client.fine_tuning.jobs.create(
        model=QUICKSTART_MODEL, training_file=file.id, suffix="topics", extra_body={"spec": quickstart_data.TRAINING_SPEC}
    )
    job = watch_job(client, job.id, console=err)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        reason = job.error.message if job.error else "no reason was given"
        raise FailedPreconditionError(f"The fine-tuning job {job.id} ended as {job.status}: {reason}")
    return job.fine_tuned_model, job.id


def _wait_served(client: OpenAI, model: str) -> None:
    with err.status(f"waiting until {model} is served"):
        deadline_s = time.monotonic() + SERVED_S
        while time.monotonic() < deadline_s:
            try:
                client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=1)
            except (openai.NotFoundError, openai.InternalServerError):
                time.sleep(1)
            else:
                return
    raise UnavailableError(f"{model} was not served within {SERVED_S:.0f} s; the logs of serving tell why.")


def _judge(client: OpenAI, rows: Sequence[quickstart_data.Row], *, tuned_model: str) -> Judged:
    def answer(call: tuple[str, quickstart_data.Row]) -> str:
        model, row = call
        reply = client.chat.completions.create(
            model=model, messages=quickstart_data.prompt(row), max_tokens=quickstart_data.MAX_ANSWER_TOKENS, temperature=0
        )
        return (reply.choices[0].message.content or "").strip()

    calls = [(model, row) for model in (QUICKSTART_MODEL, tuned_model) for row in rows]
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = list(track(pool.map(answer, calls), total=len(calls), description="asking base and tuned model", console=err))
    return Judged(rows, answers[: len(rows)], answers[len(rows) :])


def _report(judged: Judged, *, model: str) -> bool:
    base_hits = [quickstart_data.is_hit(row, text) for row, text in zip(judged.rows, judged.base_answers, strict=True)]
    tuned_hits = [quickstart_data.is_hit(row, text) for row, text in zip(judged.rows, judged.tuned_answers, strict=True)]
    table = Table("held-out question", "topic", f"base: {QUICKSTART_MODEL}", f"tuned: {model}", box=None, header_style="bold")
    for index, row in enumerate(judged.rows[:SHOWN_ROWS]):
        table.add_row(
            row.question, row.topic, _colored(judged.base_answers[index], base_hits[index]), _colored(judged.tuned_answers[index], tuned_hits[index])
        )
    out.print(table)
    low, high = quickstart_data.paired_difference_interval(base_hits, tuned_hits)
    total = len(judged.rows)
    out.print(f"score on all {total} held-out questions: base {sum(base_hits) / total:.0%}, tuned {sum(tuned_hits) / total:.0%}")
    better = low > 0
    verdict = "[green]the tuned model is better[/]" if better else "[red]not shown to be better[/]"
    out.print(f"difference {(sum(tuned_hits) - sum(base_hits)) / total:+.0%}, 95% interval {low:+.0%} to {high:+.0%}: {verdict}")
    return better


def _say_how_to_go_on(layout: Layout, *, model: str, job_id: str, http_port: int) -> None:
    url = f"http://127.0.0.1:{http_port}"
    out.print(
        f"""
[bold]How to go on[/]
  finery up --state-dir {layout.state_dir}      # the system again, with everything still there
  export FINERY_STATE_DIR={layout.state_dir}
  finery jobs get {job_id}
  finery chat --model {model}
  curl {url}/v1/models -H "authorization: Bearer $(cat {layout.api_key_file})"
  OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=$(cat {layout.api_key_file}) python -c 'import openai; print(openai.OpenAI().models.list())'""",
        soft_wrap=True,
        markup=True,
    )


def _colored(answer: str, hit: bool) -> str:
    return f"[{'green' if hit else 'red'}]{answer[:40]}[/]"


def _say(text: str) -> None:
    err.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}")
