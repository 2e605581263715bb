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
from benchmarks.workloads import CONTEXT_STEP, LONGEST_CONTEXT, IntArray, Workload, token_rows
from finery_common.errors import FineryError

GIB = 2**30
_NO_MEMORY = ("out of memory", "alloc_failed", "cudacachingallocator")
"""What messages say where memory did not suffice: torch's, cuBLAS's and cuDNN's, the allocator's where it cannot even say so."""


class Engine(Protocol):
    """A loaded model that trains. Every row is one sequence, each of its tokens but the first a label."""

    name: str
    model_dir: Path
    probes_contexts: bool
    """Whether a context's step is a pass that only goes as far as its peak of memory; whole steps otherwise."""

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
    return row_of(engine.name, workload, steps, tokens_per_step=workload.tokens_per_step)


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


def row_of(engine: str, workload: Workload, steps: Steps, *, tokens_per_step: float) -> Row:
    """The row that `steps` and the allocator's peaks make; `tokens_per_step` in the mean."""
    return Row(
        workload=workload.name,
        engine=engine,
        tok_s=round(tokens_per_step / steps.median_s, 1),
        step_s=round(steps.median_s, 5),
        num_steps=len(steps.seconds),
        num_warmup_steps=steps.num_warmup,
        loss=round(steps.losses[-1], 5),
        # Trainer logs short rows' losses five steps at a time only.
        first_loss=None if workload.kind == "short" else round(steps.losses[0], 5),
        budget_gib=workload.budget_gib,
        peak_alloc_gib=peaks_gib()[0],
        peak_reserved_gib=peaks_gib()[1],
    )


def context(engine: Engine, workload: Workload, *, budget_s: float, report: Callable[[Row], None] = lambda _: None) -> Row:
    """The longest row that trains, one step each, while the allocator is held to the workload's card.

    `report` gets the row of each success at once, as a lower bound: a process that is out of time later has said that much.
    """
    fits: list[Row] = []
    shortest_failed = math.inf

    def train(num_tokens: int) -> float | None:
        nonlocal shortest_failed
        work = replace(workload, sequence_length=num_tokens)
        reset_peaks()
        try:
            engine.prepare(work)
            steps = timed(engine, [token_rows(work, 0)], num_warmup=0)
        except (RuntimeError, MemoryError, FineryError) as error:
            if not is_out_of_memory(error):
                raise
            print(f"{num_tokens} tokens: {error}", flush=True)
            shortest_failed = min(shortest_failed, num_tokens)
            return None
        finally:
            engine.release()
        fits.append(_context_row(engine, workload, num_tokens, steps))
        print(f"{num_tokens} tokens: {steps.seconds[0]:.1f} s, peak {fits[-1].peak_alloc_gib} GiB", flush=True)
        report(fits[-1])
        return steps.seconds[0]

    with held_to(workload.budget_gib or math.inf):
        best = longest(train, start=workload.sequence_length, budget_s=budget_s)
    if best is None:
        return Row(workload=workload.name, engine=engine.name, budget_gib=workload.budget_gib, error="out of memory")
    row = next(row for row in fits if row.context_tokens == best[0])
    is_known = shortest_failed <= best[0] + max(2 * CONTEXT_STEP, best[0] // 25)
    return replace(row, is_lower_bound=None if is_known else True)


def _context_row(engine: Engine, workload: Workload, num_tokens: int, steps: Steps) -> Row:
    row = row_of(engine.name, workload, steps, tokens_per_step=num_tokens)
    return replace(
        row,
        context_tokens=num_tokens,
        is_lower_bound=True,
        is_probe=True if engine.probes_contexts else None,
        tok_s=None if engine.probes_contexts else row.tok_s,
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
        following = min(_next_length(fits, too_long), LONGEST_CONTEXT)
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
    """Whether memory did not suffice, by the allocator's word or by the engine's, which refuses what it cannot plan.

    An illegal access of memory is none.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, FineryError) and error.code == "out_of_memory"):
        return True
    return any(text in str(error).lower() for text in _NO_MEMORY)


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
