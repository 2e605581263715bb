"""Where the system on one machine keeps things: the state directory, and the tools that set-up installed beside the code."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from finery_common.errors import FailedPreconditionError
from finery_common.settings import default_state_dir

CHECKOUT = Path(__file__).resolve().parents[4]
_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.05


@dataclass(frozen=True)
class RunningStack:
    """What a running system tells those who look for it; kept in `stack.json`."""

    pid: int
    http_url: str
    grpc_address: str
    s3_endpoint: str
    metrics: dict[str, str]
    """Process -> host:port of its `/metrics`."""
    processes: dict[str, int]
    """Process name -> pid."""


@dataclass(frozen=True)
class Layout:
    """Paths of one installation on this machine."""

    state_dir: Path

    @classmethod
    def of(cls, state_dir: Path | None = None) -> Layout:
        """`state_dir`, else FINERY_STATE_DIR, else the user's state folder."""
        chosen = state_dir or (Path(os.environ["FINERY_STATE_DIR"]) if os.environ.get("FINERY_STATE_DIR") else default_state_dir())
        return cls(chosen.expanduser().resolve())

    @property
    def lock_file(self) -> Path:
        return self.state_dir / "stack.lock"

    @property
    def stack_file(self) -> Path:
        return self.state_dir / "stack.json"

    @property
    def api_key_file(self) -> Path:
        return self.state_dir / "api_key"

    @property
    def token_secret_file(self) -> Path:
        return self.state_dir / "secrets" / "token_secret"

    @property
    def catalogue_file(self) -> Path:
        return self.state_dir / "catalogue.yaml"

    @property
    def log_dir(self) -> Path:
        return self.state_dir / "logs"

    @property
    def targets_file(self) -> Path:
        """Prometheus' file_sd targets."""
        return self.state_dir / "prometheus" / "targets.json"

    def running(self) -> RunningStack | None:
        """The running system, or None. A file left by a dead process counts as none: its pid may be another's by now, its lock is not."""
        try:
            with self.lock_file.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._read_running()
        except OSError:
            return None
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the caller the one who runs a system from here. Raises FailedPreconditionError where another does."""
        with self.lock_file.open("a+") as file:
            if not _take(file):
                running = self.running()
                where = f" (pid {running.pid}, {running.http_url})" if running else ""
                raise FailedPreconditionError(
                    f"Finery is already running from {self.state_dir}{where}; see `finery status`, stop it by `finery down`, "
                    "or give another folder by --state-dir."
                )
            # Left by a predecessor that was killed; with the lock held it would count as ours.
            self.stack_file.unlink(missing_ok=True)
            yield

    def _read_running(self) -> RunningStack | None:
        try:
            return RunningStack(**json.loads(self.stack_file.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write_running(self, stack: RunningStack) -> None:
        """Publishes what runs, for the `finery` command and for Prometheus."""
        _write(self.stack_file, json.dumps(asdict(stack), indent=2))
        targets = [{"targets": [address], "labels": {"service": service}} for service, address in sorted(stack.metrics.items())]
        _write(self.targets_file, json.dumps(targets, indent=2))

    def prepare(self) -> None:
        """Makes the folders and the secret that signs the services' tokens. Raises FailedPreconditionError where it cannot."""
        try:
            for folder in (self.state_dir, self.log_dir, self.token_secret_file.parent):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self.token_secret_file.exists():
                descriptor = os.open(self.token_secret_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_urlsafe(48))
        except OSError as error:
            raise FailedPreconditionError(
                f"Cannot write the state directory {self.state_dir}: {error.strerror}; give another by --state-dir or FINERY_STATE_DIR."
            ) from error


def _take(file: IO[str]) -> bool:
    """Whether the lock was to be had. Those who only look hold it for an instant, so one look is not enough."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return True
    return False


def tools_dir() -> Path:
    """Where set-up put isolated tools and the quickstart's data: FINERY_TOOLS_DIR, else `.tools` of the checkout."""
    return Path(os.environ.get("FINERY_TOOLS_DIR") or CHECKOUT / ".tools")


def vllm_python() -> Path:
    """Python of vLLM's own environment. Raises FailedPreconditionError where there is none."""
    path = Path(os.environ.get("FINERY_VLLM_PYTHON") or CHECKOUT / ".venv-vllm" / "bin" / "python")
    if not path.exists():
        raise FailedPreconditionError(
            f"No vLLM at {path}; run `make setup`, or set FINERY_VLLM_PYTHON to the Python of an environment that has it."
        )
    return path


def find_one(pattern: str) -> Path:
    """The file under `tools_dir()` that `pattern` names. Raises FailedPreconditionError where set-up has not put it there."""
    found = sorted(tools_dir().glob(pattern))
    if not found:
        raise FailedPreconditionError(f"No {pattern} under {tools_dir()}; run `make setup`, or set FINERY_TOOLS_DIR.")
    return found[0]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
