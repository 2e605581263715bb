"""`finery deploy`, canaries and what is decided of them, against a gateway that only notes what it is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from typer.testing import CliRunner

from finery_cli.__main__ import build_app
from finery_cli.client import Gateway
from finery_cli.commands import deployments
from finery_cli.output import clear_errors

ALIAS: dict[str, object] = {
    "alias": "m",
    "base_model": "base",
    "version": "v1",
    "etag": "e7",
    "epoch": 3,
    "job_id": "ftjob-1",
    "canary": {"version": "v2", "weight": 10},
    "previous": {"version": "v0"},
    "pinned": True,
    "rollout": {"state": "canary", "version": "v2", "swap_seconds": 0.25},
}
VERSIONS = [
    {"role": "serving", "version": "v1", "weight": 90, "answered": 9, "failed": 0, "mean_first_byte_seconds": 0.012},
    {"role": "canary", "version": "v2", "weight": 10, "answered": 1, "failed": 2, "mean_first_byte_seconds": None},
]


class Native:
    """Answers with aliases, one after the other, the last for good."""

    def __init__(self, *answers: dict[str, object]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, object, str | None]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/api/v1/deployments")
        body = json.loads(request.content) if request.content else None
        self.asked.append((request.method, path, body, request.headers.get("if-match")))
        if path.endswith("/versions"):
            return httpx.Response(200, json=VERSIONS)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        status = 409 if "error" in answer else 200
        if path == "" and request.method == "GET":
            answer = {"data": [answer], "next_page_token": ""}
        return httpx.Response(status, json=answer)


def run(monkeypatch: pytest.MonkeyPatch, native: Native, *arguments: str):
    gateway = Gateway("http://gateway", "key")
    transport = httpx.MockTransport(native)
    hooks = gateway.native.event_hooks
    vars(gateway)["native"] = httpx.Client(base_url="http://gateway/api/v1", transport=transport, event_hooks=hooks)

    @contextmanager
    def connected() -> Iterator[Gateway]:
        with clear_errors("http://gateway"):
            yield gateway

    monkeypatch.setattr(deployments, "connected", connected)
    monkeypatch.setattr(deployments, "_POLL_S", 0)
    return CliRunner().invoke(build_app(), list(arguments))


def rolling(state: str, **changed: object) -> dict[str, object]:
    return ALIAS | {"rollout": {"state": state, "version": "v2", **changed}}


def test_a_canary_is_deployed_and_waited_for(monkeypatch: pytest.MonkeyPatch):
    native = Native(rolling("pending"), rolling("loading"), ALIAS)
    done = run(monkeypatch, native, "deploy", "ftjob-2", "--alias", "m", "--canary", "10")
    assert done.exit_code == 0, done.output
    assert native.asked[0] == ("POST", "", {"job_id": "ftjob-2", "alias": "m", "canary_weight": 10}, None)
    assert [method for method, *_ in native.asked] == ["POST", "GET", "GET"]
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    shown = {name: lines[name] for name in ("state", "version", "canary", "canary_weight", "previous", "pinned")}
    assert shown == {"state": "canary", "version": "v1", "canary": "v2", "canary_weight": "10", "previous": "v0", "pinned": "yes"}


def test_a_plain_deploy_sends_no_weight(monkeypatch: pytest.MonkeyPatch):
    native = Native(rolling("ready"))
    assert run(monkeypatch, native, "deploy", "ftjob-2").exit_code == 0
    assert native.asked == [("POST", "", {"job_id": "ftjob-2"}, None)]


@pytest.mark.parametrize(
    ("arguments", "path", "body"),
    [
        (["promote", "m"], "/m/promote", None),
        (["rollback", "m"], "/m/rollback", None),
        (["canary", "m", "25"], "/m/canary", {"weight": 25}),
    ],
)
def test_what_is_decided_is_decided_of_the_alias_as_it_was_read(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], path: str, body: object
):
    native = Native(ALIAS)
    done = run(monkeypatch, native, *arguments, "--json")
    assert done.exit_code == 0, done.output
    assert native.asked == [("GET", "/m", None, None), ("POST", path, body, '"e7"')]
    assert json.loads(done.stdout)["canary"] == ALIAS["canary"]


def test_a_change_that_somebody_else_was_faster_with_is_told(monkeypatch: pytest.MonkeyPatch):
    native = Native(ALIAS, {"error": {"message": "m no longer has the etag e7; read it again and decide anew."}})
    done = run(monkeypatch, native, "promote", "m")
    assert (done.exit_code, "no longer has the etag" in done.output) == (1, True)


def test_a_roll_back_to_the_version_before_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    native = Native(ALIAS, rolling("pending"), rolling("probing"), rolling("draining"))
    assert run(monkeypatch, native, "rollback", "m").exit_code == 0
    assert [method for method, *_ in native.asked] == ["GET", "POST", "GET", "GET"]


def test_a_roll_back_that_dropped_a_canary_is_over_whatever_another_rollout_did(monkeypatch: pytest.MonkeyPatch):
    native = Native(ALIAS, rolling("failed", error={"message": "another's"}))
    done = run(monkeypatch, native, "rollback", "m")
    assert (done.exit_code, len(native.asked)) == (0, 2)


def test_a_roll_back_that_fails_says_why(monkeypatch: pytest.MonkeyPatch):
    native = Native(ALIAS, rolling("pending"), rolling("failed", error={"message": "its adapter is gone"}))
    done = run(monkeypatch, native, "rollback", "m")
    assert (done.exit_code, "its adapter is gone" in done.output) == (1, True)


@pytest.mark.parametrize("action", ["pin", "unpin"])
def test_aliases_are_pinned(monkeypatch: pytest.MonkeyPatch, action: str):
    native = Native(ALIAS)
    assert run(monkeypatch, native, action, "m").exit_code == 0
    assert native.asked == [("POST", f"/m/{action}", None, None)]


def test_versions_are_shown_beside_each_other(monkeypatch: pytest.MonkeyPatch):
    done = run(monkeypatch, Native(ALIAS), "deployments", "get", "m")
    assert done.exit_code == 0, done.output
    table = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert table[0][:5] == ["role", "version", "weight", "answered", "failed"]
    assert table[1] == ["serving", "v1", "90", "9", "0", "0.012"]
    assert table[2] == ["canary", "v2", "10", "1", "2"]
    done = run(monkeypatch, Native(ALIAS), "deployments", "get", "m", "--json")
    assert json.loads(done.stdout) == ALIAS | {"versions": VERSIONS}


def test_aliases_are_listed_with_their_canaries(monkeypatch: pytest.MonkeyPatch):
    done = run(monkeypatch, Native(ALIAS), "deployments", "list")
    assert done.stdout.splitlines()[1].split() == ["m", "v1", "v2", "10", "v0", "yes", "canary"]


@pytest.mark.parametrize("weight", ["0", "100", "x"])
def test_a_weight_that_is_no_share_is_refused(monkeypatch: pytest.MonkeyPatch, weight: str):
    native = Native(ALIAS)
    for arguments in (["deploy", "ftjob-1", "--canary", weight], ["canary", "m", weight]):
        assert run(monkeypatch, native, *arguments).exit_code == 2
    assert native.asked == []
