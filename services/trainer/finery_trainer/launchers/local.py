"""Workers as subprocesses of the training service, each the head of a process group of its own, with a log file an attempt.

Workers outlive a service that is killed. Each is noted in a file of `<state>/run`, so that the next service's orderly end is theirs too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog

from finery_common.errors import UnavailableError
from finery_trainer.launchers import CONFIG_EXIT_CODE, STOPPED_EXIT_CODE, Attempt, Exit, Waiting, work_dir

_NOT_THE_WORKERS = (
    "FINERY_TOKEN_SECRET_FILE",
    "FINERY_DATABASE_URL",
    "FINERY_DATABASE_PASSWORD_FILE",
    "FINERY_GRPC_ADDRESS",
    "FINERY_METRICS_PORT",
)
_LEFTOVER_POLL_S = 0.1

log = structlog.get_logger(__name__)


class LocalLauncher:
    """Starts `python -m finery_trainer.worker` in the service's environment, without what is the service's alone."""

    def __init__(self, *, trainer_address: str, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._log_dir, self._run_dir = state_dir / "logs", state_dir / "run"
        self._env = {key: value for key, value in os.environ.items() if key not in _NOT_THE_WORKERS}
        self._env["FINERY_TRAINER_ADDRESS"] = trainer_address
        # Threads that spin at barriers make a step five times slower as soon as anything else, vLLM for one, runs on the same cores.
        self._env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._processes: dict[tuple[str, int], asyncio.subprocess.Process] = {}
        self._exits: list[Exit] = []
        self._waiters: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    async def check(self, attempt: Attempt) -> None:
        """Nothing is known before it is tried."""

    async def start(self, attempt: Attempt) -> None:
        """Raises UnavailableError where the process cannot be started."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir.mkdir(parents=True, exist_ok=True)
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
                    env=self._env
                    | {
                        "FINERY_WORKER_TOKEN_FILE": f"/dev/fd/{reader}",
                        "FINERY_METRICS_TARGET_FILE": str(self._target_file(attempt.job_id, attempt.epoch)),
                    },
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
        self._note(attempt, process.pid)
        self._processes[attempt.job_id, attempt.epoch] = process
        waiter = asyncio.create_task(self._wait(attempt, process))
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)

    def log_file(self, job_id: str, epoch: int) -> Path:
        """Where the attempt's worker writes its log."""
        return self._log_dir / f"worker-{job_id}-{epoch}.log"

    def _target_file(self, job_id: str, epoch: int) -> Path:
        return self._state_dir / "prometheus" / f"worker-{job_id}-{epoch}.json"

    def log_place(self, job_id: str, *, epoch: int) -> str:
        """Its name below the state directory."""
        return f"{self.log_file(job_id, epoch).relative_to(self._state_dir)} in FINERY_STATE_DIR"

    def waiting(self) -> list[Waiting]:
        """None: a process begins as it is started."""
        return []

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
        for leftover in self._leftovers():
            if leftover.job_id == job_id:
                leftover.signal(signal.SIGKILL)

    async def stop_all(self, *, grace_s: float) -> None:
        """Asks every worker, also of a service before this one, to save its state and end; kills what has not after `grace_s` seconds."""
        self._is_stopping = True
        for process in self._processes.values():
            _signal_group(process, signal.SIGTERM)
        ending = asyncio.create_task(self._stop_leftovers(grace_s=grace_s))
        if self._waiters:
            await asyncio.wait(self._waiters, timeout=grace_s)
        await ending
        for process in self._processes.values():
            _signal_group(process, signal.SIGKILL)
        if self._waiters:
            await asyncio.wait(self._waiters)

    async def _wait(self, attempt: Attempt, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        del self._processes[attempt.job_id, attempt.epoch]
        self._note_file(attempt.job_id, attempt.epoch).unlink(missing_ok=True)
        self._target_file(attempt.job_id, attempt.epoch).unlink(missing_ok=True)
        # A worker that was killed could not.
        folder = work_dir(self._state_dir, job_id=attempt.job_id, epoch=attempt.epoch)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        was_stopped = self._is_stopping or code == STOPPED_EXIT_CODE
        reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        log.info("worker ended", job_id=attempt.job_id, epoch=attempt.epoch, reason=reason)
        self._exits.append(Exit(attempt.job_id, attempt.epoch, was_stopped, reason, is_final=code == CONFIG_EXIT_CODE))

    async def _stop_leftovers(self, *, grace_s: float) -> None:
        leftovers = self._leftovers()
        for leftover in leftovers:
            log.info("ending a worker of an earlier process", job_id=leftover.job_id, epoch=leftover.epoch)
            leftover.signal(signal.SIGTERM)
        alive, deadline_s = leftovers, time.monotonic() + grace_s
        while alive and time.monotonic() < deadline_s:
            await asyncio.sleep(_LEFTOVER_POLL_S)
            alive = [leftover for leftover in alive if leftover.is_alive()]
        for leftover in leftovers:
            leftover.signal(signal.SIGKILL)
            self._exits.append(Exit(leftover.job_id, leftover.epoch, True, "was stopped"))
            self._note_file(leftover.job_id, leftover.epoch).unlink(missing_ok=True)
            self._target_file(leftover.job_id, leftover.epoch).unlink(missing_ok=True)

    def _note(self, attempt: Attempt, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            noted = {"job_id": attempt.job_id, "epoch": attempt.epoch, "pid": pid, "created": psutil.Process(pid).create_time()}
            self._note_file(attempt.job_id, attempt.epoch).write_text(json.dumps(noted))

    def _note_file(self, job_id: str, epoch: int) -> Path:
        return self._run_dir / f"worker-{job_id}-{epoch}.json"

    def _leftovers(self) -> list[_Leftover]:
        """Live workers of a process before this one. The notes of those that are gone are removed."""
        found: list[_Leftover] = []
        for file in self._run_dir.glob("worker-*.json"):
            try:
                leftover = _Leftover(**json.loads(file.read_text()))
            except (OSError, ValueError, TypeError):
                continue
            if (leftover.job_id, leftover.epoch) in self._processes:
                continue
            if leftover.is_alive():
                found.append(leftover)
            else:
                file.unlink(missing_ok=True)
        return found


@dataclass(frozen=True)
class _Leftover:
    """A worker that this process did not start. Its start time, in seconds since 1970, tells it from another process of that id."""

    job_id: str
    epoch: int
    pid: int
    created: float

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def signal(self, number: signal.Signals) -> None:
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
