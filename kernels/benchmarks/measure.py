"""Measuring: the clock around training steps, the allocator's peaks, and the search for the longest context.

Knows an engine as something that takes rows and answers a loss. Which steps are run is `workloads`'; which engine, the caller's.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.baselines import Row
from benchmarks.workloads import IntArray, Workload, token_rows
from finery_common.errors import FineryError

GIB = 2**30
CONTEXT_STEP = 1024


class Engine(Protocol):
    """A loaded model that trains. Every row is one sequence, each of its tokens but the first a label."""

    name: str
    model_dir: Path

    def prepare(self, workload: Workload) -> None:
        """Gets ready for steps of `workload`; called before its first step."""
        ...

    def step(self, rows: Sequence[IntArray]) -> torch.Tensor | float:
        """One optimizer step on `rows`; answers the loss, the mean over its labels."""
        ...

    def release(self) -> None:
        """Drops what a failed or finished workload left behind, besides the model and its optimizer."""
        ...


@dataclass(frozen=True)
class Steps:
    """What timed steps gave: seconds of the measured ones, losses of all."""

    seconds: list[float]
    losses: list[float]
    num_warmup: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def fixed(engine: Engine, workload: Workload, *, num_steps: tuple[int, int]) -> Row:
    """A fixed workload: the same number of tokens each step."""
    warmup, measured = num_steps
    engine.prepare(workload)
    steps = timed(engine, (token_rows(workload, step) for step in range(warmup + measured)), num_warmup=warmup)
    return row_of(engine, workload, steps, tokens_per_step=workload.tokens_per_step)


def timed(engine: Engine, batches: Iterable[Sequence[IntArray]], *, num_warmup: int) -> Steps:
    """Runs one step for each of `batches`. The clock covers everything from host arrays to the updated weights."""
    seconds: list[float] = []
    losses: list[torch.Tensor | float] = []
    for rows in batches:
        synchronize()
        started_s = time.perf_counter()
        losses.append(engine.step(rows))
        synchronize()
        seconds.append(time.perf_counter() - started_s)
    return Steps(seconds[num_warmup:], [float(loss) for loss in losses], num_warmup)


def row_of(engine: Engine, workload: Workload, steps: Steps, *, tokens_per_step: float) -> Row:
    """The row that `steps` and the allocator's peaks make; `tokens_per_step` in the mean."""
    return Row(
        workload=workload.name,
        engine=engine.name,
        tok_s=round(tokens_per_step / steps.median_s, 1),
        step_s=round(steps.median_s, 5),
        num_steps=len(steps.seconds),
        num_warmup_steps=steps.num_warmup,
        loss=round(steps.losses[-1], 5),
        first_loss=round(steps.losses[0], 5),
        budget_gib=workload.budget_gib,
        peak_alloc_gib=peaks_gib()[0],
        peak_reserved_gib=peaks_gib()[1],
    )


def context(engine: Engine, workload: Workload, *, budget_s: float) -> Row:
    """The longest row that trains, one step each, while the allocator is held to the workload's card."""
    losses: dict[int, float] = {}
    shortest_failed = [math.inf]
    used: dict[int, tuple[float | None, float | None]] = {}

    def train(num_tokens: int) -> float | None:
        work = replace(workload, sequence_length=num_tokens)
        reset_peaks()
        try:
            engine.prepare(work)
            steps = timed(engine, [token_rows(work, 0)], num_warmup=0)
        except (RuntimeError, MemoryError, FineryError) as error:
            if not is_out_of_memory(error):
                raise
            print(f"{num_tokens} tokens: {error}", flush=True)
            shortest_failed[0] = min(shortest_failed[0], num_tokens)
            return None
        finally:
            engine.release()
        losses[num_tokens], used[num_tokens] = steps.losses[0], peaks_gib()
        print(f"{num_tokens} tokens: {steps.seconds[0]:.1f} s, peaks {used[num_tokens]} GiB", flush=True)
        return steps.seconds[0]

    with held_to(workload.budget_gib or math.inf):
        best = longest(train, start=workload.sequence_length, budget_s=budget_s)
    row = Row(workload=workload.name, engine=engine.name, budget_gib=workload.budget_gib)
    if best is None:
        return replace(row, error="out of memory")
    num_tokens, seconds = best
    return replace(
        row,
        context_tokens=num_tokens,
        is_lower_bound=None if shortest_failed[0] <= num_tokens + max(2 * CONTEXT_STEP, num_tokens // 25) else True,
        tok_s=round(num_tokens / seconds, 1),
        step_s=round(seconds, 3),
        num_steps=1,
        loss=round(losses[num_tokens], 5),
        peak_alloc_gib=used[num_tokens][0],
        peak_reserved_gib=used[num_tokens][1],
    )


def longest(
    train: Callable[[int], float | None], *, start: int, budget_s: float, clock: Callable[[], float] = time.monotonic
) -> tuple[int, float] | None:
    """The largest number of tokens that `train` manages, to about 2 %, with its seconds; None where not even 1,024.

    `train` answers None where memory does not suffice. Lengths grow by a quarter, then are halved in; a length that would not
    end within `budget_s`, by the square law of attention, is not begun.
    """
    begun_s = clock()
    best: tuple[int, float] | None = None
    fits, too_long = 0, 0
    candidate = start
    while candidate >= CONTEXT_STEP:
        if best is not None and clock() - begun_s + best[1] * (candidate / best[0]) ** 2 > budget_s:
            break
        seconds = train(candidate)
        if seconds is not None:
            fits, best = candidate, (candidate, seconds)
        else:
            too_long = candidate
        if clock() - begun_s > budget_s or (too_long and fits and too_long - fits <= max(CONTEXT_STEP, fits // 50)):
            break
        following = _next_length(fits, too_long)
        if following in (fits, too_long):
            break
        candidate = following
    return best


def _next_length(fits: int, too_long: int) -> int:
    if not too_long:
        length = max(fits * 1.25, fits + CONTEXT_STEP)
    elif not fits:
        length = too_long * 0.8
    else:
        length = (fits + too_long) / 2
    return int(length) // CONTEXT_STEP * CONTEXT_STEP


@contextmanager
def held_to(gib: float) -> Iterator[None]:
    """The allocator takes no more than `gib` of the card, as on a smaller one."""
    if not torch.cuda.is_available() or math.isinf(gib):
        yield
        return
    reset_peaks()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / torch.cuda.get_device_properties(0).total_memory))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def reset_peaks() -> None:
    """Gives cached memory back and begins new peaks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks_gib() -> tuple[float | None, float | None]:
    """The allocator's peaks since `reset_peaks`: allocated, reserved. None without a GPU."""
    if not torch.cuda.is_available():
        return None, None
    return round(torch.cuda.max_memory_allocated() / GIB, 2), round(torch.cuda.max_memory_reserved() / GIB, 2)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice, by the allocator's word or by the engine's, which refuses what it cannot plan."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in str(error).lower()


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
