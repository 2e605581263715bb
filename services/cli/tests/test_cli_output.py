"""What the command prints and sends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import typer
from typer.testing import CliRunner

from finery_cli import quickstart
from finery_cli.__main__ import build_app
from finery_cli.client import Gateway
from finery_cli.commands import jobs
from finery_cli.local.layout import Layout, RunningStack
from finery_cli.output import clear_errors, fail, say, show
from finery_cli.quickstart_data import QuestionRow, score
from finery_common.errors import UnauthenticatedError

RUNNING = RunningStack(1, "http://127.0.0.1:9", "127.0.0.1:2", "127.0.0.1:3", {}, {})


def test_an_error_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit):
        fail("suffix: got '[/x]', not [red] :heart:")
    assert capsys.readouterr().err == "error suffix: got '[/x]', not [red] :heart:\n"


def test_a_log_line_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]):
    say("the end of [/tmp/a]: [bold]\\")
    assert capsys.readouterr().err.endswith(" the end of [/tmp/a]: [bold]\\\n")


def test_values_are_printed_as_they_are_in_tables_and_alone(capsys: pytest.CaptureFixture[str]):
    row = {"filename": "[draft].jsonl", "purpose": "[/x]"}
    show([row], columns=("filename", "purpose"), as_json=False)
    show(row, columns=("filename", "purpose"), as_json=False)
    text = capsys.readouterr().out
    assert text.count("[draft].jsonl") == 2
    assert text.count("[/x]") == 2


def test_a_lost_connection_is_told_without_an_address_too(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit), clear_errors():
        raise openai.APIConnectionError(request=httpx.Request("GET", "http://x"))
    assert "error Finery does not answer; start" in capsys.readouterr().err


def test_the_quickstart_asks_the_system_of_its_folder_whatever_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FINERY_URL", "http://elsewhere")
    monkeypatch.setenv("FINERY_API_KEY", "another")
    layout = Layout.of(tmp_path)
    with pytest.raises(UnauthenticatedError, match="api_key"):
        Gateway.of_system(layout, RUNNING)
    layout.api_key_file.write_text("mine\n")
    assert Gateway.of_system(layout, RUNNING) == Gateway("http://127.0.0.1:9", "mine")
    assert Gateway.connect(tmp_path) == Gateway("http://elsewhere", "another")


def test_the_quickstart_shows_each_rows_score_without_colours(capsys: pytest.CaptureFixture[str]):
    rows = [QuestionRow("What is [/x]?", "ai"), QuestionRow("Who won?", "sports")]
    base, tuned = ["sports", "sports"], ["ai", "food"]
    result = score(rows, base_replies=base, tuned_replies=tuned)
    quickstart._report(rows, base_replies=base, tuned_replies=tuned, score=result, model="ft:base:p:topics:0123456789")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "tuned: ft:base:p:topics:0123456789"
    assert lines[2].split() == ["held-out", "question", "topic", "base", "tuned"]
    assert lines[3].split() == ["What", "is", "[/x]?", "ai", "✗", "sports", "✓", "ai"]
    assert lines[4].split() == ["Who", "won?", "sports", "✓", "sports", "✗", "food"]


def test_the_quickstart_names_the_address_of_the_system_that_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    quickstart._say_how_to_go_on(Layout.of(tmp_path), model="m", job_id="ftjob-1", url=RUNNING.http_url)
    assert f"curl {RUNNING.http_url}/v1/models" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "sent"), [([], {}), (["--deploy"], {"deploy": True}), (["--no-deploy"], {"deploy": False})])
def test_whether_a_model_is_deployed_is_sent_only_where_given(option: list[str], sent: dict[str, bool], monkeypatch: pytest.MonkeyPatch):
    bodies: list[dict[str, object]] = []

    def create(*, extra_body: dict[str, object], **_: object) -> SimpleNamespace:
        bodies.append(extra_body)
        return SimpleNamespace(status="queued", to_dict=lambda: {"id": "ftjob-1"})

    @contextmanager
    def connected() -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(openai=SimpleNamespace(fine_tuning=SimpleNamespace(jobs=SimpleNamespace(create=create))))

    monkeypatch.setattr(jobs, "connected", connected)
    done = CliRunner().invoke(build_app(), ["jobs", "create", "file-1", "--model", "m", *option])
    assert done.exit_code == 0, done.output
    assert bodies == [{"spec": {}, **sent}]
