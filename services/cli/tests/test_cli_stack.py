"""The supervisor: interrupted starts, lost ports, restarts. Real processes in the places of the services; no vLLM."""

from __future__ import annotations

import os
import signal
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from finery_cli.local import stack as stack_module
from finery_cli.local.layout import Layout
from finery_cli.local.ports import free_ports
from finery_cli.local.process import StartInterruptedError
from finery_cli.local.stack import Stack
from finery_common.errors import FailedPreconditionError, UnavailableError

SLEEPER = "import time; time.sleep(60)"
LOSES_ITS_FIRST_PORT = """
import os, sys, time
from pathlib import Path
tries = Path(os.environ["FINERY_STATE_DIR"], "tries")
first = not tries.exists()
with tries.open("a") as file:
    file.write(os.environ["FINERY_METRICS_PORT"] + chr(10))
if first:
    sys.exit("FINERY_METRICS_PORT: cannot listen on it: Address already in use; choose a free port")
time.sleep(60)
"""


class FakeStore:
    """An object store that has died once it started, and whose next start fails."""

    def __init__(self, _state_dir: Path) -> None:
        self.process = SimpleNamespace(pid=os.getpid(), poll=lambda: None)
        self.settings = SimpleNamespace(endpoint="127.0.0.1:1234", bucket="b", access_key="a", secret_key="s")
        self.asked: list[int | None] = []
        self.metrics: dict[str, str] = {}

    def start(self, *, s3_port: int | None = None, interrupted: Callable[[], bool]) -> SimpleNamespace:
        assert not interrupted()
        self.asked.append(s3_port)
        self.process.poll = lambda: 1 if len(self.asked) < 3 else None
        if len(self.asked) == 2:
            raise UnavailableError("the port [/x] is taken")
        return self.settings

    def wait_ready(self, *, timeout_s: float, interrupted: Callable[[], bool]) -> None:
        assert timeout_s > 0
        assert not interrupted()

    def stop(self) -> None:
        pass


@pytest.fixture
def make_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stack]:
    """A stack of two services, whose code is given."""

    def make(say: Callable[[str], None] = lambda _: None, *, code: str = SLEEPER) -> Stack:
        for name, text in (("alpha", code), ("gateway", SLEEPER)):
            package = tmp_path / "code" / f"finery_{name}"
            package.mkdir(parents=True)
            (package / "__init__.py").touch()
            (package / "__main__.py").write_text(text)
        if code != SLEEPER:
            monkeypatch.setattr(stack_module, "rpc_healthy", lambda _address: _tries(tmp_path) > 1)
        http_port, grpc_port = free_ports(2)
        return Stack(Layout.of(tmp_path), http_port=http_port, grpc_port=grpc_port, say=say)

    monkeypatch.setattr(stack_module, "SERVICES", ("alpha", "gateway"))
    monkeypatch.setattr(stack_module, "rpc_healthy", lambda _address: True)
    monkeypatch.setattr(stack_module, "http_healthy", lambda _url: True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    monkeypatch.setenv("FINERY_VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("FINERY_CATALOGUE", "unused")
    monkeypatch.setenv("FINERY_S3_ENDPOINT", "127.0.0.1:1")
    return make


def _tries(folder: Path) -> int:
    path = folder / "tries"
    return len(path.read_text().split()) if path.exists() else 0


def test_an_interrupt_while_it_starts_ends_it_without_a_word_of_success(make_stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pids: list[int] = []

    def interrupted_look(_address: str) -> bool:
        stack.interrupt()
        pids.extend(child.pid for child in stack._children)
        return False

    monkeypatch.setattr(stack_module, "rpc_healthy", interrupted_look)
    stack = make_stack()
    with pytest.raises(StartInterruptedError), stack.running():
        pytest.fail("it says that it is up")
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not Layout.of(tmp_path).stack_file.exists()


def test_an_interrupt_just_before_it_is_up_counts(make_stack, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stack_module, "http_healthy", lambda _url: stack.interrupt() is None)
    stack = make_stack()
    with pytest.raises(StartInterruptedError), stack.running():
        pytest.fail("it says that it is up")


def test_what_runs_is_told_anew_after_a_restart(make_stack, tmp_path: Path):
    def say(text: str) -> None:
        if "started again" in text:
            stack.interrupt()

    stack = make_stack(say)
    with stack.running() as before:
        os.kill(before.processes["alpha"], signal.SIGKILL)
        stack.supervise(poll_s=0.05)
        after = Layout.of(tmp_path).running()
        assert after is not None
        assert after.processes["alpha"] != before.processes["alpha"]
        assert psutil.pid_exists(after.processes["alpha"])
        assert after.processes["gateway"] == before.processes["gateway"]
        with urllib.request.urlopen(f"http://{after.metrics['supervisor']}/metrics", timeout=10) as answer:
            assert 'finery_supervisor_restarts_total{process="alpha"}' in answer.read().decode()


def test_a_service_that_lost_its_port_is_started_once_more_at_another(make_stack, tmp_path: Path):
    said: list[str] = []
    with make_stack(said.append, code=LOSES_ITS_FIRST_PORT).running() as running:
        first, second = (tmp_path / "tries").read_text().split()
        assert running.metrics["alpha"] == f"127.0.0.1:{second}"
        assert first != second
    assert any("took a port" in text for text in said)


def test_a_service_that_fails_otherwise_is_not_started_twice(make_stack):
    said: list[str] = []
    with pytest.raises(UnavailableError, match="no disk"), make_stack(said.append, code="raise SystemExit('no disk')").running():
        pytest.fail("it is up")
    assert not any("took a port" in text for text in said)


def test_a_store_that_cannot_come_back_yet_is_tried_again_at_its_port(make_stack, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.delenv("FINERY_S3_ENDPOINT")
    monkeypatch.setattr(stack_module, "SeaweedFS", FakeStore)
    monkeypatch.setattr(stack_module, "_STORE_BACKOFF_S", (0.05,))

    def say(text: str) -> None:
        said.append(text)
        if len(stack._store.asked) == 2 and "is started again" in text:
            stack.interrupt()

    stack = make_stack(say)
    with stack.running():
        monkeypatch.setattr(stack, "_is_stopping", lambda: False)
        stack.supervise(poll_s=0.01)
        assert stack._store.asked == [None, 1234, 1234]
    assert any("still down" in text and "[/x]" in text for text in said)


def test_serving_has_as_many_processes_as_are_wanted_each_with_a_gpu(make_stack, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stack_module, "SERVICES", ("serving", "gateway"))
    monkeypatch.setenv("FINERY_SERVING_REPLICAS", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    stack = make_stack()
    ports = stack._choose_ports()
    env = stack._environment(ports)
    assert env["FINERY_SERVING_ADDRESS"] == f"ipv4:127.0.0.1:{ports.rpc['serving']},127.0.0.1:{ports.rpc['serving-2']}"
    first, second = (stack._child(name, env=env, ports=ports)._env for name in ("serving", "serving-2"))
    assert [child["FINERY_SERVING_REPLICA"] for child in (first, second)] == ["", "2"]
    assert [child["CUDA_VISIBLE_DEVICES"] for child in (first, second)] == ["0", "1"]
    assert first["FINERY_GRPC_ADDRESS"] != second["FINERY_GRPC_ADDRESS"]


@pytest.mark.parametrize("text", ["0", "-1", "two", "65"])
def test_a_number_of_replicas_that_is_none_is_refused(make_stack, monkeypatch: pytest.MonkeyPatch, text):
    monkeypatch.setenv("FINERY_SERVING_REPLICAS", text)
    with pytest.raises(FailedPreconditionError, match="FINERY_SERVING_REPLICAS"):
        make_stack()
