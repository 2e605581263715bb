"""A cluster's cache of base models: filled once, checked by digest, waited for."""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading

import pytest

from finery_common.base_weights import fill, read_sources, wait
from finery_common.catalogue import folder_sha256
from finery_common.errors import DataLossError, DeadlineExceededError, FailedPreconditionError, NotFoundError


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def sources(tmp_path, text: str):
    path = tmp_path / "sources.yaml"
    path.write_text(text)
    return read_sources(path)


def stored(model, object_store) -> str:
    prefix = f"projects/test-{secrets.token_hex(6)}/models/tiny/"
    with object_store.writer(prefix, kind="model") as writer:
        writer.put_folder(model)
        writer.publish(made_from={}, spec={}, attempt="1")
    return prefix


def digest_of(folder, tmp_path) -> str:
    return folder_sha256(folder, memo_dir=tmp_path / "memo")


def test_a_stored_model_appears_whole_and_nothing_else_stays(tmp_path, model, cache, object_store):
    sha256 = digest_of(model, tmp_path)
    wanted = sources(tmp_path, f"models: [{{name: tiny, s3_prefix: {stored(model, object_store)}, sha256: {sha256}}}]")
    fill(wanted, cache, store=object_store)
    assert [path.name for path in cache.iterdir()] == ["tiny"]
    assert digest_of(cache / "tiny", tmp_path) == sha256
    written = (cache / "tiny" / "model.safetensors").stat()
    fill(wanted, cache, store=None)  # nothing is fetched a second time
    assert (cache / "tiny" / "model.safetensors").stat() == written


def test_a_model_with_another_digest_never_appears(tmp_path, model, cache, object_store):
    wanted = sources(tmp_path, f"models: [{{name: tiny, s3_prefix: {stored(model, object_store)}, sha256: '{'0' * 64}'}}]")
    with pytest.raises(DataLossError, match=f"tiny: its files have the SHA-256 {digest_of(model, tmp_path)}, wanted 0000"):
        fill(wanted, cache, store=object_store)
    assert list(cache.iterdir()) == []


def test_what_the_hub_links_to_is_copied_as_files(tmp_path, model, cache, monkeypatch):
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in model.iterdir():
        (linked / file.name).symlink_to(file)
    (linked / ".gitattributes").write_text("")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(linked))
    fill(sources(tmp_path, "models: [{name: tiny, hub_id: org/tiny}]"), cache, store=None)
    assert sorted(path.name for path in (cache / "tiny").iterdir()) == ["config.json", "model.safetensors"]
    assert not any(path.is_symlink() for path in (cache / "tiny").iterdir())


def test_a_model_that_was_put_there_by_hand_is_checked(tmp_path, model, cache):
    model.rename(cache / "tiny")
    fill(sources(tmp_path, f"models: [{{name: tiny, sha256: {digest_of(cache / 'tiny', tmp_path)}}}]"), cache, store=None)
    with pytest.raises(DataLossError, match="wanted 0000"):
        fill(sources(tmp_path, f"models: [{{name: tiny, sha256: '{'0' * 64}'}}]"), cache, store=None)
    with pytest.raises(NotFoundError, match="Base model other: there is no folder"):
        fill(sources(tmp_path, "models: [{name: other}]"), cache, store=None)


@pytest.mark.parametrize("place", ["hub_id: no-slash", "hub_id: o/n, s3_prefix: projects/p/models/m/", "path: /srv", "sha256: abc"])
def test_wrong_sources_are_refused(tmp_path, place):
    with pytest.raises(FailedPreconditionError, match="The sources .* cannot be used"):
        sources(tmp_path, f"models: [{{name: a, {place}}}]")


def test_a_pod_waits_until_the_model_is_there(model, cache):
    timer = threading.Timer(0.2, lambda: model.rename(cache / "tiny"))
    timer.start()
    wait(cache / "tiny", timeout_s=30)
    timer.join()
    with pytest.raises(DeadlineExceededError, match="other was not there after 0 s; look at the log of the Job"):
        wait(cache / "other", timeout_s=0)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, cache):
    (tmp_path / "sources.yaml").write_text("models: [{name: tiny}]")
    command = [sys.executable, "-m", "finery_common.base_weights", "fill", tmp_path / "sources.yaml", cache]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: Base model tiny: there is no folder")
