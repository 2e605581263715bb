"""How a service's process starts and ends, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, sys, time
from finery_common.errors import FailedPreconditionError
from finery_common.service import run_service, until_stopped
from finery_common.settings import ServiceSettings

async def broken():
    await asyncio.sleep(0.01)
    raise FailedPreconditionError("the background broke")

async def say_up():
    print("up", flush=True)

async def serve(settings):
    kind = sys.argv[1]
    if kind == "starts":
        try:
            print("starting", flush=True)
            await asyncio.to_thread(time.sleep, 60)
        finally:
            await asyncio.sleep(0.5)
            print("cleaned up", flush=True)
    if kind == "refuses":
        raise FailedPreconditionError("no disk")
    saying = asyncio.create_task(say_up())  # runs once until_stopped waits, its handlers set
    await until_stopped([asyncio.create_task(broken())] if kind == "breaks" else [])
    print("drained", flush=True)

sys.exit(run_service("thing", ServiceSettings, serve))
"""


def run(kind: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, kind]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_after_draining(number: signal.Signals):
    with run("serves") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.communicate(timeout=20)[0] == "drained\n"
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_during_the_start_let_it_clean_up_and_wait_for_no_thread(number: signal.Signals):
    with run("starts") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        process.send_signal(number)
        process.send_signal(number)
        out, errors = process.communicate(timeout=20)
    assert out == "cleaned up\n"
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("kind", "environment", "line"),
    [
        ("refuses", {}, "finery_thing: no disk"),
        ("breaks", {}, "finery_thing: the background broke"),
        ("serves", {"FINERY_METRICS_PORT": "many"}, "finery_thing: settings (FINERY_…): metrics_port: got 'many'"),
    ],
)
def test_what_keeps_it_from_going_on_is_one_line_and_status_1(kind: str, environment: dict[str, str], line: str):
    with run(kind, **environment) as process:
        errors = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(line)
    assert "Traceback" not in errors
