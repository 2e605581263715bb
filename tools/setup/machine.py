"""What the machine must have before anything is installed."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

from commands import SetupError

REQUIRED_PROGRAMS = ("gcc", "make")
# Both environments, the tools, and pip's cache while it unpacks.
NEEDED_BYTES = 10 * 2**30
NEEDED_WHEN_INSTALLED_BYTES = 1 * 2**30


def check(root: Path, *, is_installed: bool) -> None:
    """Raises SetupError naming everything that is missing, in one go."""
    problems = [*_python_problems(), *_program_problems(), *_disk_problems(root, is_installed=is_installed)]
    if problems:
        raise SetupError("This machine lacks something:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _python_problems() -> list[str]:
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return []
    return [f"Python is {platform.python_version()} ({sys.executable}); 3.11, 3.12 or 3.13 is wanted: make setup PYTHON=…"]


def _program_problems() -> list[str]:
    missing = [name for name in REQUIRED_PROGRAMS if shutil.which(name) is None]
    return [f"no {' and no '.join(missing)}; on Debian or Ubuntu: apt-get install {' '.join(missing)}"] if missing else []


def _disk_problems(root: Path, *, is_installed: bool) -> list[str]:
    needed_bytes = NEEDED_WHEN_INSTALLED_BYTES if is_installed else NEEDED_BYTES
    free_bytes = shutil.disk_usage(root).free
    if free_bytes >= needed_bytes:
        return []
    return [f"{root} has {free_bytes / 2**30:.1f} GiB free; {needed_bytes / 2**30:.0f} GiB are wanted"]
