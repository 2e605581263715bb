"""A push in a process of its own: how it is started, heard and ended, and its `python -m finery_converter.push_process <task.json>`.

The token goes in by standard input, so that it is in no file, argument or environment. The process reports as the conversion's worker
does, one JSON object a line; `{"pushed"}` before a good end, `{"error"}` before another. Cancelling `run` kills it: what it has uploaded no
commit names, and another push goes on from there.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import structlog

from finery_common.errors import BY_STATUS, FineryError, InternalError
from finery_common.leash import leashed
from finery_converter.launcher import OnReport, WorkerDiedError
from finery_converter.push import Pushed, push

_SHUT_OUT = ("HF_", "HUGGING_FACE_", "FINERY_")
"""Variables that would change what the library does or carry secrets; the proxies' and certificates' stay."""
# Of what Xet storage does not answer, before bytes go by Git LFS instead; the library's own patience is four minutes.
_XET_PATIENCE = {"HF_XET_CLIENT_RETRY_MAX_DURATION": "60s"}

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class PushTask:
    """What a push is told; never the token."""

    folder: str
    repository: str
    endpoint: str
    revision: str
    private: bool
    commit_message: str
    card: str | None = None


async def run(task: PushTask, *, token: str, scratch_dir: Path, on_report: OnReport) -> Pushed:
    """Runs `task` to its end. Raises what `push` raises, and WorkerDiedError where the process was killed."""
    task_file, log_file = scratch_dir / "push.json", scratch_dir / "push.log"
    task_file.write_text(json.dumps(asdict(task)))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SHUT_OUT)}
    own = {"HF_HOME": str(scratch_dir / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    with log_file.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *leashed([sys.executable, "-m", "finery_converter.push_process", str(task_file)]),
            env=kept | own | _XET_PATIENCE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
        )
    try:
        assert process.stdin is not None
        process.stdin.write(token.encode())
        process.stdin.close()
        ended = await _hear(process, on_report)
        returncode = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())
    if isinstance(ended, FineryError):
        raise ended
    if ended is not None and returncode == 0:
        return ended
    log.error("push ended", pid=process.pid, returncode=returncode, output=log_file.read_text(errors="replace")[-4000:].replace(token, "…"))
    if returncode < 0:
        raise WorkerDiedError(f"The push was ended by signal {-returncode}.")
    raise InternalError(f"The push failed (exit status {returncode}); its output is in the converter's log.")


async def _hear(process: asyncio.subprocess.Process, on_report: OnReport) -> Pushed | FineryError | None:
    """Passes reports on until the process closes its end; answers how it says it ended."""
    assert process.stdout is not None
    ended: Pushed | FineryError | None = None
    async for line in process.stdout:
        message = json.loads(line)
        if "error" in message:
            said = message["error"]
            ended = BY_STATUS[said["kind"]](said["message"], code=said["code"], param=said["param"])
        elif "pushed" in message:
            ended = Pushed(**message["pushed"])
        else:
            await on_report(message["step"], message["progress"])
    return ended


def main(task_file: Path, token: str, lines: TextIO) -> int:
    """Does the task in `task_file`, reporting to `lines`; answers the exit status."""
    task = PushTask(**json.loads(task_file.read_text()))
    said = -1.0

    def say(message: dict[str, object]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    def report(share: float) -> None:
        nonlocal said
        # A line for each block read would be too many.
        if share - said >= 0.005 or share == 1.0:
            said = share
            say({"step": "pushing", "progress": round(share, 4)})

    try:
        pushed = push(
            Path(task.folder),
            task.repository,
            token=token,
            endpoint=task.endpoint,
            revision=task.revision,
            private=task.private,
            commit_message=task.commit_message,
            card=task.card,
            on_progress=report,
        )
    except FineryError as error:
        say({"error": {"kind": error.status, "code": error.code, "message": error.message, "param": error.param}})
        return 1
    say({"pushed": asdict(pushed)})
    return 0


if __name__ == "__main__":
    # What libraries print must not mix with the reports.
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main(Path(sys.argv[1]), sys.stdin.read(), protocol))
