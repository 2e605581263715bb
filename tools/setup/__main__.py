"""`make setup`: builds what is missing or out of date, side by side, and says what it does.

Runs on a bare Python: nothing but the standard library is there yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine
from commands import Reporter, SetupError, say
from environments import Environment, environments

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Returns the exit status: 0 when everything is up to date."""
    started_at = time.monotonic()
    try:
        with _only_one(ROOT):
            changed = make_all(ROOT)
    except SetupError as error:
        say(f"\nSet-up stopped. {error}")
        return 1
    except KeyboardInterrupt:
        say("\nSet-up stopped by Ctrl-C; make setup goes on with what is there.")
        return 130
    if changed:
        say(f"Set-up done in {time.monotonic() - started_at:.0f} s.")
    return 0


def make_all(root: Path) -> list[Environment]:
    """Brings every environment up to date; returns those that had to be built.

    Raises SetupError when the machine lacks something or a build fails; what was built by then is kept.
    """
    stale = [environment for environment in environments(root) if not environment.is_current()]
    if not stale:
        return []
    machine.check(root, is_installed=all(environment.folder.exists() for environment in stale))
    names = ", ".join(environment.name for environment in stale)
    say(f"Setting up {names} with Python {sys.version.split()[0]} (several minutes the first time; logs in .tools/logs):")
    with ThreadPoolExecutor(max_workers=2) as pool:
        builds = [pool.submit(_make, environment, root) for environment in stale]
    errors = [error for build in builds if (error := build.exception())]
    if errors:
        raise errors[0]
    return stale


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Waits for another set-up of this working copy, which may well do all there is to do."""
    (root / ".tools").mkdir(exist_ok=True)
    with (root / ".tools" / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is running here; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(environment: Environment, root: Path) -> None:
    reporter = Reporter(environment.name, log_path=root / ".tools" / "logs" / f"setup-{environment.name.lstrip('.')}.log")
    started_at = time.monotonic()
    environment.make(reporter)
    reporter.say(f"ready after {time.monotonic() - started_at:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
