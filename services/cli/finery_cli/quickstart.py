"""The main job from end to end on this machine, on real data: does fine-tuning help, and by how much?

Owns the order of the steps and what is shown. The data and the judging are `quickstart_data`'s, the system is `local.stack`'s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
from openai import OpenAI
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from finery_cli import quickstart_data
from finery_cli.client import Gateway
from finery_cli.local.layout import Layout, RunningStack, find_one
from finery_cli.local.stack import QUICKSTART_MODEL, Stack
from finery_cli.output import Pulse, clear_errors, err, out, say
from finery_cli.quickstart_data import QuestionRow, Score
from finery_cli.watch import watch_job
from finery_common.errors import FailedPreconditionError, UnavailableError
from finery_common.settings import default_state_dir

SHOWN_ROWS = 12
CONCURRENCY = 8
SERVED_S = 300.0


def run_quickstart(layout: Layout, *, http_port: int, grpc_port: int) -> bool:
    """Runs the main job; True where the tuned model beats the base by more than the 95% interval of the difference."""
    started_s = time.monotonic()
    with _system(layout, http_port=http_port, grpc_port=grpc_port) as running, clear_errors(running.http_url):
        client = Gateway.of_system(layout, running).openai
        rows = quickstart_data.split(quickstart_data.load_rows(_corpus_folder()))
        model, job_id = _train(client, rows.train)
        for name in (QUICKSTART_MODEL, model):
            _wait_served(client, name)
        base_replies, tuned_replies = _ask_both(client, rows.held_out, tuned_model=model)
        score = quickstart_data.score(rows.held_out, base_replies=base_replies, tuned_replies=tuned_replies)
        _report(rows.held_out, base_replies=base_replies, tuned_replies=tuned_replies, score=score, model=model)
    _say_how_to_go_on(layout, model=model, job_id=job_id, url=running.http_url)
    say(f"done in {time.monotonic() - started_s:.0f} s")
    return score.is_clear_win


@contextmanager
def _system(layout: Layout, *, http_port: int, grpc_port: int) -> Iterator[RunningStack]:
    running = layout.running()
    if running is not None:
        say(f"using the system that runs already at {running.http_url}")
        yield running
        return
    stack = Stack(layout, http_port=http_port, grpc_port=grpc_port, say=say)
    with stack.running() as started:
        # What this thread restarts gets TERM when the thread ends, so it ends last: just before everything is stopped.
        supervisor = threading.Thread(target=stack.supervise, name="supervisor", daemon=True)
        supervisor.start()
        try:
            yield started
        finally:
            stack.interrupt()
            supervisor.join()


def _train(client: OpenAI, rows: Sequence[QuestionRow]) -> tuple[str, str]:
    say(f"uploading {len(rows)} training rows: questions, each with the topic it belongs to")
    file = client.files.create(file=("topics.jsonl", quickstart_data.to_jsonl(rows)), purpose="fine-tune")
    say(f"fine-tuning {QUICKSTART_MODEL} with LoRA (vLLM starts meanwhile)")
    job = client.fine_tuning.jobs.create(
        model=QUICKSTART_MODEL, training_file=file.id, suffix="topics", extra_body={"spec": quickstart_data.TRAINING_SPEC}
    )
    job = watch_job(client, job.id)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        reason = job.error.message if job.error else "no reason was given"
        raise FailedPreconditionError(f"The fine-tuning job {job.id} ended as {job.status}: {reason}")
    return job.fine_tuned_model, job.id


def _wait_served(client: OpenAI, model: str) -> None:
    with err.status(Text(f"waiting until {model} is served")):
        deadline_s = time.monotonic() + SERVED_S
        while time.monotonic() < deadline_s:
            try:
                client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=1)
            except (openai.NotFoundError, openai.InternalServerError):
                time.sleep(1)
            else:
                return
    raise UnavailableError(f"{model} was not served within {SERVED_S:.0f} s; the logs of serving tell why.")


def _ask_both(client: OpenAI, rows: Sequence[QuestionRow], *, tuned_model: str) -> tuple[list[str], list[str]]:
    def ask(call: tuple[str, QuestionRow]) -> str:
        model, row = call
        reply = client.chat.completions.create(
            model=model, messages=row.messages, max_tokens=quickstart_data.MAX_REPLY_TOKENS, temperature=0
        )
        return (reply.choices[0].message.content or "").strip()

    calls = [(model, row) for model in (QUICKSTART_MODEL, tuned_model) for row in rows]
    say(f"asking base and tuned model the same {len(rows)} held-out questions")
    replies: list[str] = []
    pulse = Pulse()
    with ThreadPoolExecutor(CONCURRENCY) as pool, Progress(console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task("asking", total=len(calls))
        for reply in pool.map(ask, calls):
            replies.append(reply)
            progress.advance(task)
            pulse.beat(f"{len(replies)} of {len(calls)} answers")
    return replies[: len(rows)], replies[len(rows) :]


def _report(rows: Sequence[QuestionRow], *, base_replies: Sequence[str], tuned_replies: Sequence[str], score: Score, model: str) -> None:
    out.print(Text(f"base: {QUICKSTART_MODEL}\ntuned: {model}"), soft_wrap=True)
    table = Table("held-out question", "topic", "base", "tuned", box=None, header_style="bold")
    for index, row in enumerate(rows[:SHOWN_ROWS]):
        base = _judged(base_replies[index], hit=score.base_hits[index])
        tuned = _judged(tuned_replies[index], hit=score.tuned_hits[index])
        table.add_row(Text(row.question), row.topic, base, tuned)
    out.print(table)
    out.print(
        Text(
            f"({min(SHOWN_ROWS, len(rows))} of {len(rows)} shown; ✓ where the first topic that the answer names is the right one)",
            style="dim",
        )
    )
    low, high = score.interval
    verdict = "[green]the tuned model is better[/]" if score.is_clear_win else "[red]not shown to be better[/]"
    out.print(f"score on all {len(rows)} held-out questions: base {score.base_accuracy:.0%}, tuned {score.tuned_accuracy:.0%}")
    out.print(f"difference {score.tuned_accuracy - score.base_accuracy:+.0%}, 95% interval {low:+.0%} to {high:+.0%}: {verdict}")


def _say_how_to_go_on(layout: Layout, *, model: str, job_id: str, url: str) -> None:
    out.print(Text("\nHow to go on", style="bold"))
    elsewhere = "" if layout.state_dir == default_state_dir().resolve() else f"  export FINERY_STATE_DIR={layout.state_dir}\n"
    out.print(
        Text(f"""\
  . .venv/bin/activate
{elsewhere}  finery up -d      # the system again, with everything still there; finery down stops it
  finery jobs get {job_id}
  finery chat --model {model}
  curl {url}/v1/models -H "authorization: Bearer $(cat {layout.api_key_file})"
  OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=$(cat {layout.api_key_file}) python -c 'import openai; print(openai.OpenAI().models.list())'"""),
        soft_wrap=True,
    )


def _judged(reply: str, *, hit: int) -> Text:
    mark = "✓" if hit else "✗"
    return Text(f"{mark} {' '.join(reply.split())}", style="green" if hit else "red")


def _corpus_folder() -> Path:
    return find_one(f"chatterbot-corpus/**/english/{quickstart_data.TOPICS[0]}.yml").parent
