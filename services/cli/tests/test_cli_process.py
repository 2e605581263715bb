"""The supervisor's children and the state directory, with real processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finery_cli.__main__ import build_app
from finery_cli.local.layout import Layout, RunningStack
from finery_cli.local.process import ChildProcess
from finery_common.errors import FailedPreconditionError, UnavailableError


def child(tmp_path: Path, code: str, *, healthy: Callable[[], bool] = lambda: True) -> ChildProcess:
    return ChildProcess("thing", [sys.executable, "-c", code], env=dict(os.environ), log_file=tmp_path / "thing.log", healthy=healthy)


def test_a_child_that_dies_at_start_is_reported_with_its_last_words(tmp_path: Path):
    process = child(tmp_path, "import sys; sys.exit('no disk for me')", healthy=lambda: False)
    process.start()
    with pytest.raises(UnavailableError, match=r"(?s)thing exited with 1.*no disk for me"):
        process.wait_healthy(timeout_s=30, interrupted=lambda: False)


def test_a_child_that_never_turns_healthy_is_reported_in_time(tmp_path: Path):
    process = child(tmp_path, "import time; time.sleep(60)", healthy=lambda: False)
    process.start()
    with pytest.raises(UnavailableError, match="not healthy after 0 s"):
        process.wait_healthy(timeout_s=0.2, interrupted=lambda: False)
    process.stop()


def test_a_child_that_ignores_term_is_killed(tmp_path: Path):
    ready = tmp_path / "ready"
    code = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w').close(); time.sleep(60)"
    process = child(tmp_path, code, healthy=ready.exists)
    process.start()
    process.wait_healthy(timeout_s=30, interrupted=lambda: False)
    process.stop(timeout_s=0.5)
    assert process.exit_code() == -9


def test_a_child_that_died_is_started_again(tmp_path: Path):
    process = child(tmp_path, "raise SystemExit(3)")
    process.start()
    deadline_s = time.monotonic() + 30
    while process.restarts < 2:
        process.keep_running()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.stop()


def test_what_runs_is_told_only_while_it_runs(tmp_path: Path):
    layout = Layout.of(tmp_path)
    layout.prepare()
    stack = RunningStack(os.getpid(), "http://127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", {"gateway": "127.0.0.1:4"}, {"gateway": 5})
    with layout.locked():
        layout.write_running(stack)
        assert layout.running() == stack
    assert layout.running() is None


def test_a_new_owner_of_the_lock_does_not_stand_for_what_a_dead_one_wrote(tmp_path: Path):
    layout = Layout.of(tmp_path)
    layout.prepare()
    layout.write_running(RunningStack(os.getpid(), "", "", "", {}, {}))
    with layout.locked():
        assert layout.running() is None


def test_a_second_system_of_one_folder_is_refused_and_the_first_one_named(tmp_path: Path):
    layout = Layout.of(tmp_path)
    layout.prepare()
    with layout.locked():
        layout.write_running(RunningStack(os.getpid(), "http://127.0.0.1:1", "", "", {}, {}))
        with pytest.raises(FailedPreconditionError, match="already running.*127.0.0.1:1"), layout.locked():
            pass


def test_down_leaves_alone_who_has_the_pid_of_a_system_that_died(tmp_path: Path):
    layout = Layout.of(tmp_path)
    layout.prepare()
    other = child(tmp_path, "import time; time.sleep(60)")
    other.start()
    layout.write_running(RunningStack(other.pid or 0, "http://127.0.0.1:1", "", "", {}, {}))
    done = CliRunner().invoke(build_app(), ["down", "--state-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "Nothing runs" in done.output
    assert other.exit_code() is None
    other.stop()


def test_the_token_secret_is_made_once_and_private(tmp_path: Path):
    layout = Layout.of(tmp_path)
    layout.prepare()
    secret = layout.token_secret_file.read_text()
    layout.prepare()
    assert layout.token_secret_file.read_text() == secret
    assert layout.token_secret_file.stat().st_mode & 0o777 == 0o600
    assert len(secret) >= 32


def test_a_state_directory_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPreconditionError, match="state-dir"):
        Layout.of(tmp_path / "file" / "state").prepare()
