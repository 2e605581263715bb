"""Running the set-up's commands: each has a log, a line when it ends, and a sign of life while it lasts."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

SIGN_OF_LIFE_S = 20.0
TAIL_LINES = 25
_print_lock = threading.Lock()


class SetupError(Exception):
    """A person has to do something; the text says what."""


def say(text: str) -> None:
    """Prints one whole line, also when two environments are being built at once."""
    with _print_lock:
        print(text, flush=True)


class Reporter:
    """Runs the steps of one environment and tells their names and times."""

    def __init__(self, name: str, *, log_path: Path) -> None:
        self._name = name
        self._log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_text("")

    def say(self, text: str) -> None:
        """One line under this environment's name."""
        say(f"  {self._name:<12} {text}")

    def run(self, step: str, command: list[str], *, env: dict[str, str] | None = None) -> None:
        """Runs `command`; its output goes to the log. Raises SetupError with the log's end when it fails."""
        if self.try_run(step, command, env=env):
            return
        tail = "\n".join(self._log_path.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise SetupError(f"{self._name}: {step} failed. The end of {self._log_path}:\n{tail}")

    def try_run(self, step: str, command: list[str], *, env: dict[str, str] | None = None) -> bool:
        """Runs `command`; returns whether it exited 0."""
        started_at = time.monotonic()
        with self._log_path.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=os.environ | (env or {})
            ) as process:
                exit_code = self._wait(process, step=step, started_at=started_at)
        if exit_code == 0:
            self.say(f"{step} ({time.monotonic() - started_at:.0f} s)")
        return exit_code == 0

    def _wait(self, process: subprocess.Popen[bytes], *, step: str, started_at: float) -> int:
        while True:
            try:
                return process.wait(timeout=SIGN_OF_LIFE_S)
            except subprocess.TimeoutExpired:
                self.say(f"{step} … {time.monotonic() - started_at:.0f} s: {self._last_line()}")

    def _last_line(self) -> str:
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:80] if lines else ""
