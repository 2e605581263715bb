"""Preparing one dataset: a staged file in, published shards' content out.

Owns the order of work, its progress and the report on bad rows. Leaves jobs, leases and publication to `runner`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from finery_common.errors import FineryError, InvalidArgumentError, Violation
from finery_common.spec import DatasetType
from finery_dataprep.base_tokenizer import BaseTokenizer
from finery_dataprep.lines import Line, count_lines, is_utf16, read_batches
from finery_dataprep.metrics import BAD_ROWS, ROWS, TOKENS
from finery_dataprep.pool import BadRow, EncodedBatch, WorkerPool, open_pool
from finery_dataprep.shards import ShardWriter, Statistics

# OpenAI's minimum: below it a run is a mistake more often than a wish.
MIN_ROWS = 10
MAX_REPORTED_ROWS = 100
BAD_FILE = "invalid_training_file"
_ONE_WORKER_BYTES = 2 * 1024 * 1024

OnProgress = Callable[[int, int], Awaitable[None]]
"""Called with the lines done and the lines in all."""


@dataclass
class _Outcome:
    num_rows: int = 0
    num_bad_rows: int = 0
    reported: list[BadRow] = field(default_factory=list)


async def prepare(
    path: Path,
    *,
    base: BaseTokenizer,
    dataset_type: DatasetType,
    max_sequence_length: int,
    now: datetime,
    max_workers: int,
    shards: ShardWriter,
    on_progress: OnProgress,
) -> Statistics:
    """Encodes the training file `path` into `shards`, a large one in `max_workers` processes. Cancelling it ends them at once.

    `shards` must be of `dataset_type` as well. Raises InvalidArgumentError with a violation for each bad row (the first 100, with the
    total) or for a file that is no training file, and FailedPreconditionError for a base model whose template cannot be used.
    """
    if await asyncio.to_thread(is_utf16, path):
        raise _bad_file("The file is UTF-16, wanted UTF-8; save it as UTF-8.", [BadRow(1, "row", "begins with UTF-16's byte order mark")])
    num_lines = await asyncio.to_thread(count_lines, path)
    outcome = _Outcome()
    size_bytes = (await asyncio.to_thread(path.stat)).st_size
    num_workers = 1 if size_bytes < _ONE_WORKER_BYTES else max_workers
    async with open_pool(
        base, dataset_type=dataset_type, max_sequence_length=max_sequence_length, now=now, num_workers=num_workers
    ) as pool:
        await _encode_all(path, pool, shards, outcome, depth=2 * num_workers, report=lambda done: on_progress(done, num_lines))
    _check(outcome)
    return await asyncio.to_thread(shards.finish)


async def _encode_all(
    path: Path, pool: WorkerPool, shards: ShardWriter, outcome: _Outcome, *, depth: int, report: Callable[[int], Awaitable[None]]
) -> None:
    """Keeps `depth` batches under way and takes them in order."""
    batches = read_batches(path)
    under_way: deque[asyncio.Task[EncodedBatch]] = deque()
    num_done = 0
    try:
        while True:
            batch = await asyncio.to_thread(_next, batches)
            if batch is not None:
                under_way.append(asyncio.create_task(pool.encode(batch)))
            while under_way and (batch is None or len(under_way) >= depth):
                encoded = await under_way.popleft()
                await _take(encoded, shards, outcome)
                num_done += encoded.num_lines
                await report(num_done)
            if batch is None:
                return
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _next(batches: Iterator[list[Line]]) -> list[Line] | None:
    return next(batches, None)


async def _take(batch: EncodedBatch, shards: ShardWriter, outcome: _Outcome) -> None:
    outcome.num_rows += batch.num_lines
    outcome.num_bad_rows += len(batch.bad_rows)
    outcome.reported += batch.bad_rows[: MAX_REPORTED_ROWS - len(outcome.reported)]
    ROWS.inc(batch.num_lines)
    TOKENS.inc(len(batch.input_ids))
    BAD_ROWS.inc(len(batch.bad_rows))
    # After a bad row only the report matters; no more shards are stored.
    if outcome.num_bad_rows == 0:
        await asyncio.to_thread(shards.add, batch.row_lengths, input_ids=batch.input_ids, label_mask=batch.label_mask)


def _check(outcome: _Outcome) -> None:
    if outcome.num_bad_rows:
        first = outcome.reported[0]
        left_out = outcome.num_bad_rows - len(outcome.reported)
        more = f" The first {len(outcome.reported)} are listed, {left_out} are not." if left_out else ""
        raise _bad_file(
            f"{outcome.num_bad_rows} of {outcome.num_rows} rows cannot be used; the first is line {first.line}: {first.field}: "
            f"{first.description}.{more} Correct them and upload the file again.",
            outcome.reported,
        )
    if outcome.num_rows == 0:
        raise _bad_file(f"The file is empty, wanted at least {MIN_ROWS} rows: one JSON object on each line.", [])
    if outcome.num_rows < MIN_ROWS:
        rows = "1 row" if outcome.num_rows == 1 else f"{outcome.num_rows} rows"
        raise _bad_file(f"The file has {rows}, wanted at least {MIN_ROWS}; add rows and upload it again.", [])


def _bad_file(message: str, bad_rows: list[BadRow]) -> FineryError:
    violations = [Violation(row.field, row.description, row.line) for row in bad_rows]
    return InvalidArgumentError(message, code=BAD_FILE, param="file", violations=violations)
