"""What the command prints and sends."""

from __future__ import annotations

import json
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
from finery_cli.commands import estimate, jobs
from finery_cli.commands.jobs import settings_of
from finery_cli.commands.options import read_settings
from finery_cli.local.layout import Layout, RunningStack
from finery_cli.output import clear_errors, fail, say, show
from finery_cli.quickstart_data import QuestionRow, score
from finery_common.errors import UnauthenticatedError
from finery_common.spec import TrainingSpec

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


@pytest.mark.parametrize(
    ("option", "sent"),
    [
        ([], {}),
        (["--deploy"], {"deploy": True}),
        (["--no-deploy"], {"deploy": False}),
        (["--method", "dpo", "--quantization", "nf4"], {"spec": {"method": "dpo", "quantization": "nf4"}}),
        (
            ["--epochs", "2", "--learning-rate", "0.1", "--spec", '{"seed": 1}'],
            {"spec": {"seed": 1, "num_epochs": 2, "optimizer": {"learning_rate": 0.1}}},
        ),
    ],
)
def test_what_is_not_given_is_not_sent(option: list[str], sent: dict[str, object], monkeypatch: pytest.MonkeyPatch):
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


@pytest.mark.parametrize(
    ("given", "words"),
    [("nowhere.json", "No such file"), (".", "Is a directory"), ("{1}", "wanted JSON"), ("[1]", "wanted a JSON object")],
)
def test_a_spec_that_cannot_be_read_is_named_with_its_cause(given: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit):
        read_settings(given if given[0] in "{[" else str(tmp_path / given))
    assert words in " ".join(capsys.readouterr().err.split())


ESTIMATE = {
    "gpu_memory": {
        "weights_bytes": 6 << 30,
        "adapters_bytes": 336 << 20,
        "gradients_bytes": 336 << 20,
        "optimizer_states_bytes": 1 << 20,
        "activations_bytes": 1 << 30,
        "workspace_bytes": 1 << 30,
        "total_bytes": 9 << 30,
    },
    "host_bytes": 0,
    "gpus": [{"index": 0, "name": "NVIDIA L4 [x]", "total_bytes": 24 << 30, "free_bytes": 23 << 30, "fits": True}],
    "fits": None,
}


def estimated(monkeypatch: pytest.MonkeyPatch, options: list[str], **changed: object):
    """What `finery estimate` sent and printed."""
    sent: list[dict[str, object]] = []

    def post(path: str, *, json: dict[str, object]) -> SimpleNamespace:
        assert path == "/estimate"
        sent.append(json)
        return SimpleNamespace(json=lambda: ESTIMATE | changed)

    @contextmanager
    def connected() -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(native=SimpleNamespace(post=post))

    monkeypatch.setattr(estimate, "connected", connected)
    return sent, CliRunner().invoke(build_app(), ["estimate", "--model", "m", *options])


def test_an_estimate_is_a_small_table(monkeypatch: pytest.MonkeyPatch):
    sent, done = estimated(monkeypatch, ["--method", "dpo", "--spec", '{"lora": {"rank": 8}}'])
    assert done.exit_code == 0, done.output
    assert sent == [{"spec": {"base_model": "m", "method": "dpo", "lora": {"rank": 8}}}]
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[:8]] == [
        "part", "weights", "adapters", "gradients", "optimizer states", "activations", "workspace", "total",
    ]  # fmt: skip
    assert lines[1].split() == ["weights", "6.00", "GiB"]
    assert lines[-1].split() == ["0", "NVIDIA", "L4", "[x]", "24.00", "GiB", "23.00", "GiB", "yes"]


def test_an_estimate_for_machines_is_the_answer_itself(monkeypatch: pytest.MonkeyPatch):
    _, done = estimated(monkeypatch, ["--quantization", "nf4", "--json"])
    assert json.loads(done.stdout) == ESTIMATE


@pytest.mark.parametrize(("fits", "word"), [(True, "is enough"), (False, "is too small")])
def test_another_gpus_memory_can_be_asked_about(monkeypatch: pytest.MonkeyPatch, fits: bool, word: str):
    sent, done = estimated(monkeypatch, ["--gpu-memory", "24GiB"], fits=fits)
    assert sent[0]["device_memory_bytes"] == 24 << 30
    assert word in done.output


@pytest.mark.parametrize("size", ["much", "0.5", "auto", "-1"])
def test_a_size_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, size: str):
    sent, done = estimated(monkeypatch, ["--gpu-memory", size])
    assert (done.exit_code, sent) == (1, [])
    assert f"got {size!r}" in done.output.replace("\n", " ")


def test_a_job_tells_what_it_trains_with_and_what_is_not_the_default():
    plain = settings_of(TrainingSpec.parse({"base_model": "m"}))
    assert plain == {"method": "lora", "lora.rank": 16, "optimizer.learning_rate": 2e-4, "num_epochs": 1}
    asked = {"base_model": "m", "quantization": "nf4", "lora": {"use_dora": True}, "memory": {"budget": "8GiB"}}
    assert settings_of(TrainingSpec.parse(asked)) == plain | {"quantization": "nf4", "lora.use_dora": True, "memory.budget": "8GiB"}
    assert settings_of(TrainingSpec.parse({"base_model": "m", "method": "full"})) == {
        "method": "full",
        "optimizer.learning_rate": 2e-5,
        "num_epochs": 1,
    }
