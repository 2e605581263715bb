"""Following a fine-tuning job: a progress bar with loss, tokens a second and time left, until the job is final."""

from __future__ import annotations

import time

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finery_cli.output import Pulse, err, say

FINAL = ("succeeded", "failed", "cancelled")
_POLL_S = 0.5
_PAGE = 100


def watch_job(client: OpenAI, job_id: str, *, stop_when_paused: bool = True) -> FineTuningJob:
    """Shows a job's events until it is final (or paused); answers its last state. Ctrl-C stops watching, never the job."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    ends = (*FINAL, "paused") if stop_when_paused else FINAL
    seen: set[str] = set()
    pulse = Pulse()
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task("waiting", total=None, detail="")
        while True:
            job = client.fine_tuning.jobs.retrieve(job_id)
            for event in _new_events(client, job_id, seen):
                step = _metrics(event)
                if step is None:
                    say(event.message, at_s=event.created_at)
                else:
                    detail = f"loss {step['train_loss']:.3f}  {step['tokens_per_second']:.0f} tokens/s"
                    pulse.beat(f"step {step['step']:.0f} of {step['total_steps']:.0f}: {detail}")
                    progress.update(task, description="training", completed=step["step"], total=step["total_steps"], detail=detail)
            if job.status in ends and not _is_being_deployed(job):
                return job
            time.sleep(_POLL_S)


def _is_being_deployed(job: FineTuningJob) -> bool:
    """A job that has succeeded is of use a moment later, when its model answers; OpenAI's type has no field for it."""
    deployment = (job.model_extra or {}).get("deployment")
    return job.status == "succeeded" and isinstance(deployment, dict) and deployment.get("state") == "pending"


def _new_events(client: OpenAI, job_id: str, seen: set[str]) -> list[FineTuningJobEvent]:
    """Events not seen before, oldest first. The API lists the newest first, so pages are read until a known one comes."""
    fresh: list[FineTuningJobEvent] = []
    for event in client.fine_tuning.jobs.list_events(job_id, limit=_PAGE):
        if event.id in seen:
            break
        fresh.append(event)
    seen.update(event.id for event in fresh)
    return fresh[::-1]


def _metrics(event: FineTuningJobEvent) -> dict[str, float] | None:
    if event.type != "metrics" or not isinstance(event.data, dict):
        return None
    return event.data if {"step", "total_steps", "train_loss", "tokens_per_second"} <= event.data.keys() else None
