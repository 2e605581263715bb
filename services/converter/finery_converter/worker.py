"""The conversion itself, in a process of its own: `python -m finery_converter.worker <task.json>`.

Owns the way the launcher hears of it: one JSON object a line on standard output, `{"step", "progress"}` while it works, `{"error"}` before
a non-zero exit. Knows folders only: no store, no database, no network. The launcher cancels it by killing it; it dies with its launcher.
What it does is `recipe`'s.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import TextIO

from finery_common.errors import FineryError, ResourceExhaustedError

NICENESS = 10
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(task_file: Path, lines: TextIO) -> int:
    """Runs the task in `task_file`, reporting to `lines`; answers the exit status."""
    from finery_converter.recipe import Task, cook

    def say(message: dict[str, object]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    try:
        cook(Task.read(task_file), lambda step, share: say({"step": step, "progress": round(share, 4)}))
    except FineryError as error:
        say({"error": {"kind": error.status, "code": error.code, "message": error.message, "param": error.param}})
        return 1
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        said = f"The disk filled up while converting: {error.strerror}."
        say({"error": {"kind": ResourceExhaustedError.status, "code": "disk_full", "message": said, "param": None}})
        return 1
    return 0


if __name__ == "__main__":
    os.nice(NICENESS)
    # What libraries print must not mix with the reports.
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main(Path(sys.argv[1]), protocol))
