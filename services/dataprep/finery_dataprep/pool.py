"""Worker processes for one dataset: lines in, tokens out, in any number at once.

Owns their start, their answers and their end: a worker that does not answer in time is killed, and closing the pool kills all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finery_common.errors import FailedPreconditionError, UnavailableError
from finery_common.spec import DatasetType
from finery_dataprep.base_tokenizer import BaseTokenizer
from finery_dataprep.frames import pack, read_frame_async
from finery_dataprep.lines import Line

ANSWER_LIMIT_S = 60.0


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used."""

    line: int
    field: str
    description: str


@dataclass(frozen=True)
class EncodedBatch:
    """The good rows of a batch, concatenated in order, and the bad ones. `row_lengths` are in tokens; a pair is two rows."""

    num_lines: int
    row_lengths: Sequence[int]
    input_ids: NDArray[np.int32]
    label_mask: NDArray[np.uint8]
    bad_rows: Sequence[BadRow]


class WorkerPool:
    """Made by `open_pool`."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        for worker in workers:
            self._idle.put_nowait(worker)

    async def encode(self, lines: Sequence[Line]) -> EncodedBatch:
        """Encodes one batch as soon as a worker is free. Raises FailedPreconditionError where the template breaks a limit."""
        worker = await self._idle.get()
        try:
            header, body = await worker.ask(_request(lines))
        finally:
            self._idle.put_nowait(worker)
        lengths: list[int] = header["lengths"]
        num_tokens = sum(lengths)
        return EncodedBatch(
            num_lines=len(lines),
            row_lengths=lengths,
            input_ids=np.frombuffer(body, dtype=np.int32, count=num_tokens),
            label_mask=np.frombuffer(body, dtype=np.uint8, offset=4 * num_tokens, count=num_tokens),
            bad_rows=[BadRow(*item) for item in header["errors"]],
        )


@contextlib.asynccontextmanager
async def open_pool(
    base: BaseTokenizer, *, dataset_type: DatasetType, max_sequence_length: int, now: datetime, num_workers: int
) -> AsyncIterator[WorkerPool]:
    """Starts `num_workers` processes that encode for `base` and ends them with the block.

    Raises FailedPreconditionError where the base model's template or tokenizer cannot be used.
    """
    setup = pack({"base": asdict(base), "type": dataset_type.value, "max_sequence_length": max_sequence_length, "now": now.isoformat()})
    workers: list[_Worker] = []
    try:
        for _ in range(num_workers):
            workers.append(_Worker(await _start_process()))
        await asyncio.gather(*(worker.ask(setup) for worker in workers))
        yield WorkerPool(workers)
    finally:
        for worker in workers:
            await asyncio.shield(worker.kill())


class _Worker:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, frame: bytes) -> tuple[dict[str, Any], bytes]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                stdin.write(frame)
                await stdin.drain()
                header, body = await read_frame_async(stdout)
        except TimeoutError as error:
            await self.kill()
            raise FailedPreconditionError(
                f"The chat template of the base model did not come to an end within {ANSWER_LIMIT_S:g} s; simplify it.",
                code="chat_template_limit",
            ) from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise UnavailableError(
                "A worker of dataprep ended without an answer, most likely for lack of memory; its log says more. Try again.",
                code="worker_lost",
            ) from error
        if "fatal" in header:
            raise FailedPreconditionError(header["fatal"]["message"], code=header["fatal"]["code"])
        return header, body

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


async def _start_process() -> asyncio.subprocess.Process:
    # No setting of ours, hence no credential, reaches the process that runs templates.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FINERY_")}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "finery_dataprep.worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


def _request(lines: Sequence[Line]) -> bytes:
    sizes = [(line.number, None if line.is_too_long else len(line.data)) for line in lines]
    return pack({"lines": sizes}, b"".join(line.data for line in lines))
