"""Starting a conversion's worker as a subprocess of this machine, hearing it out, and ending it.

Owns the worker process. Cancelling `run` kills the worker and everything it started before it returns.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from finery_common.errors import BY_STATUS, FineryError, InternalError
from finery_common.leash import leashed
from finery_converter.task import Task

log = structlog.get_logger(__name__)

OnReport = Callable[[str, float], Awaitable[None]]
"""Called with the step's name and the share of the work done, 0 to 1."""


class WorkerDiedError(Exception):
    """Something other than the conversion ended the worker: a kill, no memory. Another attempt may do better."""


async def run(task: Task, *, scratch_dir: Path, on_report: OnReport) -> None:
    """Runs `task` to its end. Raises the FineryError that the worker reports, or WorkerDiedError where it was killed."""
    task_file, log_file = scratch_dir / "task.json", scratch_dir / "worker.log"
    task.write(task_file)
    with log_file.open("wb") as output:
        # Merging waits for disk and memory, and on a busy machine many threads wait for one another: half of the cores is plenty.
        process = await asyncio.create_subprocess_exec(
            *leashed([sys.executable, "-m", "finery_converter.worker", str(task_file)]),
            # And such as wait must not spin: on busy cores one merge took seven times as long by it.
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)), "OMP_WAIT_POLICY": "PASSIVE"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
        )
    try:
        error = await _hear(process, on_report)
        returncode = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())
    if error is not None:
        raise error
    if returncode != 0:
        log.error("worker ended", pid=process.pid, returncode=returncode, output=log_file.read_text(errors="replace")[-4000:])
    if returncode < 0:
        raise WorkerDiedError(f"The worker was ended by signal {-returncode}.")
    if returncode > 0:
        raise InternalError(f"The conversion's worker failed (exit status {returncode}); its output is in the converter's log.")


async def _hear(process: asyncio.subprocess.Process, on_report: OnReport) -> FineryError | None:
    """Passes reports on until the worker closes its end; answers the error it reported, if any."""
    assert process.stdout is not None
    error: FineryError | None = None
    async for line in process.stdout:
        message = json.loads(line)
        if "error" in message:
            said = message["error"]
            error = BY_STATUS[said["kind"]](said["message"], code=said["code"], param=said["param"])
        else:
            await on_report(message["step"], message["progress"])
    return error
