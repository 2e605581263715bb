"""A module of ours that loads llama.cpp, in a process of its own that is killed with this one.

Owns starting it, the lines that it reports by and what a death without words means. The child's `main` is `child_main`: it reads one JSON
request and writes JSON objects, one a line: `{"progress"}`, `{"result"}`, `{"error"}`. Leaves the work to the module.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TextIO

from finery_common.errors import BY_STATUS, FineryError, InternalError, ResourceExhaustedError
from finery_common.leash import leashed

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_KEPT_BYTES = 2000
Progress = Callable[[float], None]


def run(module: str, request: Mapping[str, object], *, on_progress: Progress) -> dict[str, object]:
    """Runs `python -m module` on `request` and answers its result; `on_progress` gets the share done.

    Start it from the main thread (see `leash`). Raises the FineryError that the child reported, InternalError where it died without one.
    """
    with TemporaryFile() as errors:
        process = subprocess.Popen(
            leashed([sys.executable, "-m", module]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            _send(process.stdin, request)
            try:
                result = _follow(process.stdout, on_progress)
            except BaseException:
                process.kill()
                raise
        if result is None:
            raise _death(module, process.returncode, _tail(errors))
        return result


def _send(stdin: IO[str], request: Mapping[str, object]) -> None:
    try:
        with stdin:
            json.dump(request, stdin)
    except BrokenPipeError:
        # It has died, which its exit status tells.
        return


def _follow(lines: IO[str], on_progress: Progress) -> dict[str, object] | None:
    """What the child answered; None where it ended without."""
    result = None
    for line in lines:
        message = json.loads(line)
        if "error" in message:
            error = message["error"]
            raise BY_STATUS[error["status"]](error["message"], code=error["code"])
        if "progress" in message:
            on_progress(message["progress"])
        result = message.get("result", result)
    return result


def _death(module: str, returncode: int, text: str) -> InternalError:
    how = f"was ended by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with status {returncode}"
    hint = " The machine may have run out of memory." if returncode == -signal.SIGKILL else ""
    return InternalError(f"The process of {module} {how}.{hint} {text}".rstrip(), code="engine_process_died")


def _tail(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - _KEPT_BYTES))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def child_main(work: Callable[[dict[str, object], Progress], Mapping[str, object]]) -> int:
    """The child's side: reads the request, does `work`, reports; answers the exit status."""
    # What libraries print must not mix with the reports.
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        result = work(json.load(sys.stdin), lambda share: _say(protocol, {"progress": round(share, 4)}))
    except FineryError as error:
        _say(protocol, {"error": {"status": error.status, "code": error.code, "message": error.message}})
        return 1
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        full = disk_full(Path(error.filename) if isinstance(error.filename, str) else None)
        _say(protocol, {"error": {"status": full.status, "code": full.code, "message": full.message}})
        return 1
    _say(protocol, {"result": dict(result)})
    return 0


def disk_full(file: Path | None) -> ResourceExhaustedError:
    """The error of a disk that filled up while `file` was written."""
    name = file.name if file else "its output"
    return ResourceExhaustedError(f"The disk filled up while {name} was written; free space and convert again.", code="disk_full")


def _say(protocol: TextIO, message: Mapping[str, object]) -> None:
    protocol.write(json.dumps(message) + "\n")
    protocol.flush()
