"""`finery keys`: what it hands on to the gateway's own command."""

import subprocess
import sys

from typer.testing import CliRunner

from finery_cli.__main__ import build_app


def _keys(*words: str) -> int:
    return CliRunner().invoke(build_app(), ["keys", *words]).exit_code


def test_limits_reach_the_gateways_command(tmp_path, capfd):
    state = ("--state-dir", str(tmp_path))
    assert _keys("create", "--project", "alpha", "--requests-per-minute", "60", *state) == 0
    assert capfd.readouterr().out.startswith("sk-finery-")
    assert (tmp_path / "db" / "gateway.sqlite").exists()


def test_what_is_not_said_is_not_handed_on(tmp_path, monkeypatch):
    commands = []

    def run(command, *, env, check):
        commands.append((command, env["FINERY_STATE_DIR"]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    limits = ("--requests-per-minute", "unlimited", "--tokens-per-minute", "1000", "--concurrent-streams", "2")
    assert _keys("update", "--project", "alpha", "--id", "key-1", *limits, "--state-dir", str(tmp_path)) == 3
    assert _keys("list", "--state-dir", str(tmp_path)) == 3
    gateway = [sys.executable, "-m", "finery_gateway.keys"]
    assert commands == [
        ([*gateway, "update", "--project", "alpha", "--id", "key-1", *limits], str(tmp_path)),
        ([*gateway, "list", "--project", "default"], str(tmp_path)),
    ]


def test_keys_of_another_installation_are_not_made_in_this_ones_database(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FINERY_URL", "http://finery.example:8080")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _keys("create", "--project", "alpha") == 1
    assert list(tmp_path.rglob("*.sqlite")) == []
    assert _keys("create", "--project", "alpha", "--state-dir", str(tmp_path)) == 0
    assert capfd.readouterr().out.count("sk-finery-") == 1
