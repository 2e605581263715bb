"""Workers as subprocesses of the training service, each the head of a process group of its own, with a log file an attempt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import structlog

from finery_common.errors import UnavailableError
from finery_trainer.launchers import Attempt, Exit

STOPPED_EXIT_CODE = 75
"""What a worker that was told to stop, and saved its state, exits with (sysexits' EX_TEMPFAIL)."""
_NOT_THE_WORKERS = ("FINERY_TOKEN_SECRET_FILE", "FINERY_DATABASE_URL", "FINERY_GRPC_ADDRESS", "FINERY_METRICS_PORT")

log = structlog.get_logger(__name__)


class LocalLauncher:
    """Starts `python -m finery_trainer.worker` in the service's environment, without what is the service's alone."""

    def __init__(self, *, trainer_address: str, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._env = {key: value for key, value in os.environ.items() if key not in _NOT_THE_WORKERS}
        self._env["FINERY_TRAINER_ADDRESS"] = trainer_address
        # Threads that spin at barriers make a step five times slower as soon as anything else, vLLM for one, runs on the same cores.
        self._env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._processes: dict[tuple[str, int], asyncio.subprocess.Process] = {}
        self._exits: list[Exit] = []
        self._waiters: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    async def start(self, attempt: Attempt) -> None:
        """Raises UnavailableError where the process cannot be started."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        # A pipe holds the token until the worker reads it: nothing on the disk, in arguments or in the environment.
        reader, writer = os.pipe()
        try:
            os.write(writer, attempt.token.encode())
            os.close(writer)
            with self.log_file(attempt.job_id, attempt.epoch).open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "finery_trainer.worker",
                    env=self._env | {"FINERY_WORKER_TOKEN_FILE": f"/dev/fd/{reader}"},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(reader,),
                    start_new_session=True,
                )
        except OSError as error:
            raise UnavailableError(f"The worker process cannot be started: {error.strerror}.") from error
        finally:
            os.close(reader)
        self._processes[attempt.job_id, attempt.epoch] = process
        waiter = asyncio.create_task(self._wait(attempt, process))
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)

    def log_file(self, job_id: str, epoch: int) -> Path:
        """Where the attempt's worker writes its log."""
        return self._log_dir / f"worker-{job_id}-{epoch}.log"

    def take_exits(self) -> list[Exit]:
        """The workers that ended since the last call."""
        exits, self._exits = self._exits, []
        return exits

    async def kill(self, job_id: str) -> None:
        """Ends the job's worker, and its children, at once."""
        for (owner, _), process in list(self._processes.items()):
            if owner == job_id:
                _signal_group(process, signal.SIGKILL)
                await process.wait()

    async def stop_all(self, *, grace_s: float) -> None:
        """Asks every worker to save its state and end; kills what has not after `grace_s` seconds."""
        self._is_stopping = True
        for process in self._processes.values():
            _signal_group(process, signal.SIGTERM)
        if self._waiters:
            await asyncio.wait(self._waiters, timeout=grace_s)
        for process in self._processes.values():
            _signal_group(process, signal.SIGKILL)
        if self._waiters:
            await asyncio.wait(self._waiters)

    async def _wait(self, attempt: Attempt, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        del self._processes[attempt.job_id, attempt.epoch]
        was_stopped = self._is_stopping or code == STOPPED_EXIT_CODE
        reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        log.info("worker ended", job_id=attempt.job_id, epoch=attempt.epoch, reason=reason)
        self._exits.append(Exit(attempt.job_id, attempt.epoch, was_stopped, reason))


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
