"""One supervised child process: start, log, health, restart with backoff, stop."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finery_common.errors import FineryError, UnavailableError

STOP_S = 30.0
_BACKOFF_S = (0.5, 1, 2, 5, 10, 30)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if os.name == "posix" else None


class StartInterruptedError(FineryError):
    """Somebody asked for an end while something was starting."""

    def __init__(self) -> None:
        super().__init__("stopped before it was up")


class ChildProcess:
    """A child in a session of its own, so that Ctrl-C reaches the supervisor alone; it gets TERM where the supervisor dies."""

    def __init__(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], log_file: Path, healthy: Callable[[], bool]) -> None:
        self.name = name
        self.restarts = 0
        self._argv = tuple(argv)
        self._env = dict(env)
        self._log_file = log_file
        self._healthy = healthy
        self._process: subprocess.Popen[bytes] | None = None
        self._next_start_s = 0.0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts it; what it prints is appended to the log file."""
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=term_with_parent,  # noqa: PLW1509  one call into libc, which takes no lock of ours
            )

    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def is_healthy(self) -> bool:
        return self._process is not None and self.exit_code() is None and self._healthy()

    def wait_healthy(self, *, timeout_s: float, interrupted: Callable[[], bool]) -> None:
        """Raises UnavailableError, with the log's last lines, where it dies or is not healthy in time; StartInterruptedError where told."""
        deadline_s = time.monotonic() + timeout_s
        while not self.is_healthy():
            if self.exit_code() is not None:
                raise UnavailableError(f"{self.name} exited with {self.exit_code()} at start. {self.last_words()}")
            if time.monotonic() > deadline_s:
                raise UnavailableError(f"{self.name} was not healthy after {timeout_s:.0f} s. {self.last_words()}")
            if interrupted():
                raise StartInterruptedError
            time.sleep(0.1)

    def keep_running(self) -> bool:
        """Starts it again where it died and its backoff is over. True where it was started."""
        if self.exit_code() is None:
            return False
        if self._next_start_s == 0.0:
            self._next_start_s = time.monotonic() + _BACKOFF_S[min(self.restarts, len(_BACKOFF_S) - 1)]
        if time.monotonic() < self._next_start_s:
            return False
        self._next_start_s = 0.0
        self.restarts += 1
        self.start()
        return True

    def stop(self, *, timeout_s: float = STOP_S) -> None:
        """TERM, then KILL after `timeout_s` seconds."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_words(self, *, num_lines: int = 8) -> str:
        """The end of its log, for an error's text."""
        try:
            lines = self._log_file.read_text(errors="replace").splitlines()[-num_lines:]
        except OSError:
            lines = []
        return "\n".join([f"The end of {self._log_file}:", *(f"  {line[:400]}" for line in lines)])


def term_with_parent() -> None:
    """For a new child: TERM when the thread that starts it ends, as it does when its process is killed."""
    _signal_with_parent(signal.SIGTERM)


def kill_with_parent() -> None:
    """As `term_with_parent`, for a program that does not end on TERM."""
    _signal_with_parent(signal.SIGKILL)


def _signal_with_parent(number: signal.Signals) -> None:
    if _LIBC is not None and hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)
