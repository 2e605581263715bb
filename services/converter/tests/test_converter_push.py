"""Pushing to a Hub by the real client, against a stand-in of the Hub's HTTP API."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_stand_in import Fault, HubStandIn, running_hub
from huggingface_hub import ModelCard

from finery_common.errors import (
    FailedPreconditionError,
    FineryError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from finery_converter import push_process
from finery_converter.model_card import Lineage, license_of, model_card
from finery_converter.push import Patience, Pushed, push
from finery_converter.settings import ConverterSettings

# The Hub's client hands files to its HTTP client in a way that is going out.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPOSITORY = "ada/merged"
TOKEN = "hf_good"
CARD = model_card(Lineage(title="merged", manifest_sha256="a" * 64, base_model="m", base_model_hub_id="org/m", license="mit"))
SHORT = Patience(attempts=3, first_wait_s=0.01)


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with running_hub() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small file, one in LFS, and one that goes up in four parts."""
    made = tmp_path / "model"
    (made / "sub").mkdir(parents=True)
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "sub" / "empty.txt").write_bytes(b"")
    (made / "small.safetensors").write_bytes(os.urandom(5000))
    (made / "model.safetensors").write_bytes(os.urandom(3_500_001))
    return made


@pytest.fixture
def pushing(hub, folder) -> Callable[..., Pushed]:
    def run(**changes) -> Pushed:
        given = {"token": TOKEN, "endpoint": hub.url, "commit_message": "merged", "patience": SHORT} | changes
        return push(given.pop("folder", folder), given.pop("repository", REPOSITORY), **given)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_byte_arrives_in_one_commit(hub, folder, pushing):
    shares: list[float] = []
    pushed = pushing(on_progress=shares.append)
    assert hub.content(REPOSITORY) == contents(folder)
    first, made = hub.commits(REPOSITORY)
    assert (made.message, made.sha, pushed.commit, pushed.is_new) == ("merged", pushed.commit, made.sha, True)
    assert pushed.url == f"{hub.url}/{REPOSITORY}/commit/{made.sha}"
    assert first.files[".gitattributes"] == made.files[".gitattributes"]
    assert hub.repositories[REPOSITORY].private
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert len(hub.asked(rf"PUT /storage/{digest}/\d")) == 4
    assert made.files["model.safetensors"].sha256 == digest
    assert not made.files["config.json"].sha256
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > 10


def test_the_same_content_makes_no_second_commit(hub, pushing):
    first = pushing(card=CARD)
    hub.requests.clear()
    second = pushing(card=CARD)
    assert (second.commit, second.url, second.is_new) == (first.commit, first.url, False)
    assert len(hub.commits(REPOSITORY)) == 2
    assert hub.asked("PUT|POST") == []


def test_only_what_changed_is_sent(hub, folder, pushing):
    pushing()
    hub.requests.clear()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert pushing().is_new
    assert hub.content(REPOSITORY) == contents(folder)
    assert hub.asked("PUT|lfs") == []


def test_parts_of_a_model_that_is_replaced_go_and_other_files_stay(hub, folder, pushing):
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "m.q4_0-00001-of-00002.gguf"):
        (folder / name).write_bytes(os.urandom(100))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    pushing()
    other = folder.parent / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"whole")
    pushing(folder=other)
    assert set(hub.content(REPOSITORY)) == {
        "config.json",
        "sub/empty.txt",
        "small.safetensors",
        "model.safetensors",
        "m.q4_0-00001-of-00002.gguf",
    }
    assert not pushing(folder=other).is_new


def test_a_branch_is_made_where_it_is_missing(hub, folder, pushing):
    pushing(revision="v1/q4")
    assert hub.content(REPOSITORY, "v1/q4") == contents(folder)
    assert hub.content(REPOSITORY) == {}
    assert not pushing(revision="v1/q4").is_new


def test_a_public_repository_is_made_where_it_is_asked_for(hub, pushing):
    pushing(private=False)
    assert not hub.repositories[REPOSITORY].private


def test_what_is_to_be_private_is_not_pushed_into_a_public_repository(hub, pushing):
    hub.create(REPOSITORY, private=False)
    with pytest.raises(FailedPreconditionError, match=r"is public.*private: false") as caught:
        pushing()
    assert caught.value.code == "hub_repository_public"
    assert len(hub.commits(REPOSITORY)) == 1
    assert hub.asked("POST|PUT") == []


FULL = Fault("POST", "/commit/", status=403, headers={"x-error-message": "Private storage limit reached"})
FAULTS = {
    "storage fails": Fault("PUT", r"/storage/\w+$", status=500),
    "storage refuses a URL that has run out": Fault("PUT", r"/storage/\w+/2$", status=403),
    "a connection breaks within a part": Fault("PUT", r"/storage/\w+/3$", drops=True),
    "the Hub asks to wait": Fault("POST", "/preupload/", status=429, headers={"retry-after": "0"}),
    "the Hub restarts": Fault("GET", "/tree/", status=503),
    "the commit fails": Fault("POST", "/commit/", status=502),
    "the answer to the commit is lost": Fault("POST", "/commit/", drops=True, after_it_is_done=True),
    "the answer to the creation is lost": Fault("POST", "/repos/create", drops=True, after_it_is_done=True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_is_gone_through(hub, folder, pushing, name):
    fault = Fault(**vars(FAULTS[name]))
    hub.faults.append(fault)
    pushing()
    assert fault.times == 0
    assert hub.content(REPOSITORY) == contents(folder)
    assert len(hub.commits(REPOSITORY)) == 2


def test_two_pushes_at_one_time_make_one_commit(hub, folder, pushing):
    hub.create(REPOSITORY)
    # The second has compared when the first commits: it is the parent that tells it.
    hub.faults.append(Fault("POST", "/commit/", hangs_s=1.0))
    code = f"from pathlib import Path; from finery_converter.push import push; push(Path({str(folder)!r}), {REPOSITORY!r}, "
    slow = subprocess.Popen([sys.executable, "-c", code + f"token={TOKEN!r}, endpoint={hub.url!r}, commit_message='slow')"])
    wait_for(lambda: not hub.faults[0].times)
    pushing()
    assert slow.wait(30) == 0
    assert len(hub.asked("POST .*/commit/")) == 2
    assert len(hub.commits(REPOSITORY)) == 2
    assert hub.content(REPOSITORY) == contents(folder)


REFUSED = [
    ({"token": "hf_wrong"}, FailedPreconditionError, "hub_token_refused", "refused the token .*401"),
    ({"token": ""}, FailedPreconditionError, "hub_token_refused", "empty"),
    ({"token": "hf_a\r\nx: y"}, FailedPreconditionError, "hub_token_refused", "white space"),
    ({"repository": "bob/merged"}, FailedPreconditionError, "hub_forbidden", "bob/merged .*403.*rights"),
    ({"token": "hf_reader"}, FailedPreconditionError, "hub_forbidden", "rights"),
    ({"repository": "merged"}, InvalidArgumentError, "hub_repository_invalid", "owner/name"),
    ({"repository": "ada/a--b"}, InvalidArgumentError, "hub_repository_invalid", "owner/name"),
    ({"repository": "../ada/x"}, InvalidArgumentError, "hub_repository_invalid", "owner/name"),
]


@pytest.mark.parametrize(("changes", "kind", "code", "text"), REFUSED)
def test_what_the_hub_refuses_says_what_to_do(hub, pushing, changes, kind, code, text):
    with pytest.raises(kind, match=text) as caught:
        pushing(**changes)
    assert caught.value.code == code
    assert not changes.get("token") or changes["token"] not in str(caught.value)
    assert hub.repositories == {}
    assert hub.asked("PUT") == []


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (Fault("POST", "/commit/", status=413), ResourceExhaustedError, "hub_quota"),
        (Fault("POST", "/repos/create", status=402), ResourceExhaustedError, "hub_quota"),
        (FULL, ResourceExhaustedError, "hub_quota"),
        (Fault("POST", "/commit/", status=400, headers={"x-error-message": "bad card"}), InvalidArgumentError, "hub_refused"),
        (Fault("GET", "/revision/", status=503, times=3), UnavailableError, "hub_unreachable"),
    ],
)
def test_a_push_that_fails_leaves_no_commit_and_can_be_repeated(hub, folder, pushing, fault, kind, code):
    hub.faults.append(Fault(**vars(fault)))
    with pytest.raises(kind) as caught:
        pushing()
    assert caught.value.code == code
    assert all(len(repository.branches["main"]) == 1 for repository in hub.repositories.values())
    hub.requests.clear()
    pushing()
    assert hub.content(REPOSITORY) == contents(folder)
    if "/commit/" in fault.path:
        assert hub.asked("PUT") == [], "what had arrived is sent again"


def test_a_server_that_is_gone_or_no_hub_says_so(hub, pushing):
    started_s = time.monotonic()
    with pytest.raises(UnavailableError, match=r"http://127.0.0.1:9 cannot be reached .*FINERY_HUB_ENDPOINT") as caught:
        pushing(endpoint="http://127.0.0.1:9")
    assert caught.value.code == "hub_unreachable"
    assert time.monotonic() - started_s < 5
    hub.faults.append(Fault("GET", "/api/models", status=200, times=9))
    with pytest.raises(FailedPreconditionError, match="does not answer as a Hugging Face Hub"):
        pushing()


def test_no_error_and_no_output_names_the_token_or_where_bytes_are_sent(hub, pushing, capfd, caplog):
    caplog.set_level("DEBUG")
    hub.faults.append(Fault("PUT", "/storage/", status=409, times=99))
    with pytest.raises(FineryError) as caught:
        pushing()
    assert "storage" in caught.value.message
    assert caught.value.__suppress_context__
    out, err = capfd.readouterr()
    for text in (caught.value.message, out, err):
        assert hub.signature not in text
        assert TOKEN not in text
    ours = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("http"))
    assert hub.signature not in ours


def test_a_card_is_written_where_there_is_none(hub, folder, pushing):
    pushing(card=CARD)
    assert hub.content(REPOSITORY)["README.md"].decode() == CARD
    newer = CARD.replace("a" * 64, "b" * 64)
    assert pushing(card=newer).is_new
    assert hub.content(REPOSITORY)["README.md"].decode() == newer


def test_a_card_of_the_folder_or_of_the_repository_stays(hub, folder, pushing):
    (folder / "README.md").write_text("---\nlicense: mit\n---\nthe folder's")
    pushing(card=CARD)
    (folder / "README.md").unlink()
    assert not pushing(card=CARD).is_new
    assert hub.content(REPOSITORY)["README.md"] == b"---\nlicense: mit\n---\nthe folder's"


def test_a_card_says_what_the_model_was_made_of(tmp_path):
    adapter = ("adapters/ftjob-1-20", "c" * 64)
    made_of = {"base_model_hub_id": "org/m", "license": "apache-2.0", "format": "gguf", "type": "q8_0", "dataset": "d" * 64}
    card = ModelCard(model_card(Lineage("t", "a" * 64, "m", adapters=(adapter,), **made_of)), ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "base_model": "org/m",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "license": "apache-2.0",
        "tags": ["finery"],
    }
    for said in ("adapters/ftjob-1-20", "c" * 64, "d" * 64, "a" * 64, "q8_0"):
        assert said in card.text
    (tmp_path / "README.md").write_text(card.content)
    assert license_of(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of(tmp_path) == license_of(tmp_path / "nowhere") == ""


def test_xet_storage_that_does_not_answer_is_gone_round(hub, folder):
    hub.xet_url = "http://127.0.0.1:9"
    code = f"from pathlib import Path; from finery_converter.push import push; push(Path({str(folder)!r}), {REPOSITORY!r}, "
    command = [sys.executable, "-c", code + f"token={TOKEN!r}, endpoint={hub.url!r}, commit_message='m')"]
    few = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_MAX_DURATION": "1s", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    subprocess.run(command, env=os.environ | few, check=True, timeout=60)
    assert len(hub.asked("xet-write-token")) >= 2
    assert hub.content(REPOSITORY) == contents(folder)


def task_of(hub: HubStandIn, folder: Path) -> push_process.PushTask:
    return push_process.PushTask(str(folder), REPOSITORY, hub.url, "main", private=True, commit_message="merged", card=CARD)


async def test_a_process_of_its_own_pushes_and_reports(hub, folder, tmp_path, monkeypatch):
    # What the converter has in its environment is not for the library.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shares: list[float] = []

    async def on_report(step: str, share: float) -> None:
        assert step == "pushing"
        shares.append(share)

    pushed = await push_process.run(task_of(hub, folder), token=TOKEN, scratch_dir=tmp_path, on_report=on_report)
    assert pushed.commit == hub.commits(REPOSITORY)[-1].sha
    assert hub.content(REPOSITORY) == contents(folder) | {"README.md": CARD.encode()}
    assert shares[-1] == 1.0
    assert TOKEN not in "".join(path.read_text(errors="replace") for path in tmp_path.rglob("push.*"))
    with pytest.raises(FailedPreconditionError, match="refused the token") as caught:
        await push_process.run(task_of(hub, folder), token="hf_wrong", scratch_dir=tmp_path, on_report=on_report)
    assert (caught.value.code, caught.value.param) == ("hub_token_refused", "spec.hub.token")


async def test_a_push_that_is_cancelled_leaves_no_commit_and_the_next_goes_on(hub, folder, tmp_path):
    hub.faults.append(Fault("PUT", r"/storage/\w+/3$", hangs_s=100))
    running = asyncio.create_task(push_process.run(task_of(hub, folder), token=TOKEN, scratch_dir=tmp_path, on_report=_ignored))
    small = hashlib.sha256((folder / "small.safetensors").read_bytes()).hexdigest()
    # Files are sent side by side: the large one may be the first to get so far.
    await asyncio.to_thread(wait_for, lambda: not hub.faults[0].times and small in hub.objects)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(hub.commits(REPOSITORY)) == 1
    hub.requests.clear()
    assert (await push_process.run(task_of(hub, folder), token=TOKEN, scratch_dir=tmp_path, on_report=_ignored)).is_new
    assert hub.asked(f"PUT /storage/{small}") == [], "what had arrived is sent again"
    assert len(hub.commits(REPOSITORY)) == 2


async def _ignored(_step: str, _share: float) -> None:
    """No one listens."""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_token_is_named_and_lies_in_a_file(tmp_path):
    (tmp_path / "tokens" / "alpha").mkdir(parents=True)
    (tmp_path / "tokens" / "alpha" / "release").write_text("hf_alpha\n")
    (tmp_path / "everybody").write_text("hf_all\n")
    settings = ConverterSettings(hub_tokens_dir=tmp_path / "tokens", hub_token_file=tmp_path / "everybody")
    assert settings.hub_token("alpha", "release") == "hf_alpha"
    assert settings.hub_token("alpha", "default") == settings.hub_token("beta", "default") == "hf_all"
    (tmp_path / "tokens" / "alpha" / "default").write_text("hf_own")
    assert settings.hub_token("alpha", "default") == "hf_own"
    with pytest.raises(FailedPreconditionError, match=r"no Hub token 'release' for project beta.*beta/release") as caught:
        settings.hub_token("beta", "release")
    assert (caught.value.code, caught.value.param) == ("hub_token_missing", "spec.hub.token")
    with pytest.raises(FailedPreconditionError, match="FINERY_HUB_TOKEN_FILE"):
        ConverterSettings().hub_token("beta", "default")
