"""`finery convert` of several adapters and `finery conversions`, against a gateway that only notes what it is asked."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
from typer.testing import CliRunner

from finery_cli import output
from finery_cli.__main__ import build_app
from finery_cli.client import Gateway
from finery_cli.commands import convert

CONVERSION: dict[str, object] = {
    "id": "conv-1",
    "state": "running",
    "progress": 0.25,
    "step": "merging",
    "spec": {"adapter": "adapters/ftjob-1-20", "format": "gguf", "type": None},
    "artifact": None,
    "error": None,
    "create_time": "2026-01-01T00:00:00Z",
}
FAILED = CONVERSION | {"state": "failed", "error": {"message": "not the same model"}}


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str, dict]]:
    """What the gateway was asked: it answers a list with a conversion that runs, a POST with one that has failed."""
    asked: list[tuple[str, str, dict]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/api/v1/conversions")
        asked.append((request.method, path, json.loads(request.content) if request.content else {}))
        listed = {"data": [CONVERSION], "next_page_token": ""}
        return httpx.Response(200, json=listed if (request.method, path) == ("GET", "") else FAILED)

    gateway = Gateway("http://gateway", "key")
    vars(gateway)["native"] = httpx.Client(base_url="http://gateway/api/v1", transport=httpx.MockTransport(answer))
    newest = SimpleNamespace(list=lambda job_id, limit: [SimpleNamespace(step_number=20)] if "whole" not in job_id else [])
    jobs = SimpleNamespace(retrieve=lambda _: SimpleNamespace(status="succeeded"), checkpoints=newest)
    vars(gateway)["openai"] = SimpleNamespace(fine_tuning=SimpleNamespace(jobs=jobs))

    @contextmanager
    def connected():
        yield gateway

    monkeypatch.setattr(convert, "connected", connected)
    return asked


def run(*arguments: str):
    return CliRunner().invoke(build_app(), arguments)


def test_several_jobs_become_one_by_their_weights(asked, tmp_path):
    options = ("--combination", "ties", "--density", "0.5", "--format", "adapter", "--output", str(tmp_path))
    done = run("convert", "ftjob-a", "ftjob-b", "--weight", "1", "--weight", "0.5", *options)
    assert done.exit_code == 1
    assert "not the same model" in done.output
    [(_, _, body)] = asked
    assert body["adapters"] == [{"adapter": "adapters/ftjob-a-20", "weight": 1.0}, {"adapter": "adapters/ftjob-b-20", "weight": 0.5}]
    assert (body["combination"], body["density"], body["format"]) == ("ties", 0.5, "adapter")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ftjob-a", "--weight", "1"), "--weight: is of several adapters, and there is one job"),
        (("ftjob-a", "ftjob-b", "--weight", "1"), "--weight: got 1, wanted one for each of 2 jobs, or none"),
        (("ftjob-a", "ftjob-whole"), "models/ftjob-whole was trained whole; only adapters can be combined."),
    ],
)
def test_what_cannot_be_combined_is_said_before_anything_is_asked_for(asked, tmp_path, arguments, message):
    done = run("convert", *arguments, "--output", str(tmp_path))
    assert (done.exit_code, asked) == (1, [])
    assert message in done.output


def test_what_a_type_cost_is_shown():
    parity = {"type": "nf4", "difference": {"mean_kl": 0.0432, "top1": 0.915}, "perplexity": {"adapter": 12.25, "converted": "inf"}}
    assert convert._measured({"parity": parity}) == "perplexity adapter 12.25, converted inf; nf4: KL 0.0432 nats, top-1 91.5%"


def test_a_folder_with_files_is_refused_before_anything_is_asked_for(asked, tmp_path):
    (tmp_path / "notes.txt").touch()
    done = run("convert", "ftjob-a", "--output", str(tmp_path))
    assert (done.exit_code, asked) == (1, [])
    assert "holds files" in done.output


def test_an_interrupted_command_says_how_to_go_on(asked, tmp_path, monkeypatch):
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(FAILED, "state", "running")
    monkeypatch.setattr(convert.time, "sleep", interrupted)
    done = run("convert", "ftjob-a", "--output", str(tmp_path / "new"))
    assert done.exit_code != 0
    said = " ".join(done.output.split())
    assert f"finery artifacts download models/conv-1 --output {tmp_path / 'new'}" in said


@pytest.mark.parametrize(("patience_s", "said"), [(60.0, "failed: not the same model"), (-1.0, "conv-1 goes on")])
def test_a_service_that_is_started_again_does_not_end_the_command(asked, tmp_path, monkeypatch, patience_s, said):
    parsed, answers = convert._parsed, iter(("created", "down"))

    def flaky(answer: httpx.Response):
        if next(answers, None) == "down":
            raise httpx.ConnectError("refused")
        return parsed(answer)

    def passing(_: float) -> None:
        if next(pauses, None) is None:
            FAILED["state"] = "failed"

    pauses = iter((1,))
    monkeypatch.setitem(FAILED, "state", "running")
    monkeypatch.setattr(convert.time, "sleep", passing)
    monkeypatch.setattr(convert, "_parsed", flaky)
    monkeypatch.setattr(convert, "_PATIENCE_S", patience_s)
    done = run("convert", "ftjob-a", "--output", str(tmp_path / "new"))
    assert done.exit_code != 0
    assert said in done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--scale", "nan", "--output", "{new}"), "--scale: got nan, wanted a number"),
        (("--output", "{file}/new"), "cannot be made: Not a directory"),
    ],
)
def test_what_cannot_be_sent_or_kept_is_said_before_anything_is_asked_for(asked, tmp_path, options, said):
    (tmp_path / "file").touch()
    places = {"new": str(tmp_path / "new"), "file": str(tmp_path / "file")}
    done = run("convert", "ftjob-a", *(option.format(**places) for option in options))
    assert (done.exit_code, asked, (tmp_path / "new").exists()) == (1, [], False)
    assert said in " ".join(done.output.split())


def test_what_is_being_done_is_said_where_no_bar_is_drawn(asked, tmp_path, monkeypatch):
    def passing(_: float) -> None:
        FAILED["state"] = "failed"

    monkeypatch.setitem(FAILED, "state", "running")
    monkeypatch.setattr(convert.time, "sleep", passing)
    monkeypatch.setattr(output, "PULSE_S", 0.0)
    done = run("convert", "ftjob-a", "--output", str(tmp_path / "new"))
    assert "merging: 25% of the whole" in done.output


def test_conversions_are_listed_shown_cancelled_and_deleted(asked):
    listed = run("conversions", "list")
    assert "conv-1" in listed.output
    assert "adapters/ftjob-1-20" in listed.output
    assert "running" in listed.output
    assert "merging" in listed.output
    assert "f16" in listed.output
    shown = run("conversions", "get", "conv-1")
    assert "not the same model" in shown.output
    assert run("conversions", "cancel", "conv-1").exit_code == run("conversions", "delete", "conv-1").exit_code == 0
    assert [item[:2] for item in asked] == [("GET", ""), ("GET", "/conv-1"), ("POST", "/conv-1/cancel"), ("DELETE", "/conv-1")]
