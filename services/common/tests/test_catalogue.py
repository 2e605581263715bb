"""The catalogue: names, places, and folders that are refused."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest

from finery_common.catalogue import BaseModelEntry, Catalogue, check_folder, folder_sha256, materialize, read_config, remembered_sha256
from finery_common.errors import FailedPreconditionError, NotFoundError, UnavailableError


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def write(tmp_path, text: str):
    path = tmp_path / "catalogue.yaml"
    path.write_text(text)
    return path


def test_a_catalogue_lists_its_models_in_order_and_finds_them_by_name(tmp_path, model):
    text = """
    models:
      - {name: tiny, path: tiny, max_sequence_length: 2048}
      - {name: stored, s3_prefix: projects/base/models/m/, max_sequence_length: 512}
      - {name: hub, hub_id: org/name-1.5, max_sequence_length: 8192}
    """
    catalogue = Catalogue.load(write(tmp_path, text))
    assert [entry.name for entry in catalogue.list()] == ["tiny", "stored", "hub"]
    assert catalogue.get("tiny").path == model
    assert catalogue.get("hub").max_sequence_length == 8192
    with pytest.raises(NotFoundError, match="no base model 'huge'; there are: tiny, stored, hub"):
        catalogue.get("huge")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "is not YAML"),
        ("", "is wrong"),
        ("models: [{name: a, max_sequence_length: 9}]", "got none of them, wanted one of path, s3_prefix and hub_id"),
        ("models: [{name: a, path: x, hub_id: o/n, max_sequence_length: 9}]", "got path and hub_id"),
        ("models: [{name: a, path: x}]", "models.0.max_sequence_length: Field required"),
        ("models: [{name: 'a:b', path: x, max_sequence_length: 9}]", "models.0.name"),
        ("models: [{name: a, path: x, max_sequence_length: 9, extra: 1}]", "models.0.extra"),
        ("models: [{name: a, s3_prefix: models/, max_sequence_length: 9}]", "artifact prefix: got 'models/'"),
        ("models: [{name: a, path: x, max_sequence_length: 9}, {name: a, path: y, max_sequence_length: 9}]", "names a twice"),
    ],
)
def test_a_wrong_catalogue_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(FailedPreconditionError, match=message):
        Catalogue.load(write(tmp_path, text))


def test_a_missing_catalogue_names_the_variable_to_set(tmp_path):
    with pytest.raises(FailedPreconditionError, match="FINERY_CATALOGUE"):
        Catalogue.load(tmp_path / "none.yaml")


def test_a_local_model_is_used_where_it_lies(tmp_path, model, object_store):
    entry = BaseModelEntry(name="tiny", path=model, max_sequence_length=64)
    assert materialize(entry, cache_dir=tmp_path / "cache", store=object_store) == model


def test_a_stored_model_is_fetched_into_the_cache(tmp_path, model, object_store):
    prefix = f"projects/test-{secrets.token_hex(6)}/models/tiny/"
    with object_store.writer(prefix, kind="model") as writer:
        writer.put_folder(model)
        ref = writer.publish(made_from={}, spec={}, attempt="1")
    entry = BaseModelEntry(name="tiny", s3_prefix=prefix, max_sequence_length=64)
    folder = materialize(entry, cache_dir=tmp_path / "cache", store=object_store)
    assert folder == tmp_path / "cache" / ref.manifest_sha256
    assert folder_sha256(folder, memo_dir=tmp_path / "memo") == folder_sha256(model, memo_dir=tmp_path / "memo")


def test_an_unreachable_hub_says_what_to_do(tmp_path, object_store, monkeypatch):
    def fail(*_: object, **__: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    entry = BaseModelEntry(name="hub", hub_id="org/name", max_sequence_length=64)
    with pytest.raises(UnavailableError, match="Cannot fetch org/name from the Hub .*use a local folder"):
        materialize(entry, cache_dir=tmp_path, store=object_store)


def test_only_safetensors_come_from_the_hub(tmp_path, model, object_store, monkeypatch):
    asked: dict[str, Any] = {}

    def answer(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    entry = BaseModelEntry(name="hub", hub_id="org/name", max_sequence_length=64)
    assert materialize(entry, cache_dir=tmp_path, store=object_store) == model
    assert asked["repo_id"] == "org/name"
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["allow_patterns"])


def test_pickled_weights_are_refused(tmp_path, model, object_store):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    entry = BaseModelEntry(name="tiny", path=model, max_sequence_length=64)
    with pytest.raises(FailedPreconditionError, match=r"lacks model\.safetensors.*pytorch_model\.bin.*never loaded"):
        materialize(entry, cache_dir=tmp_path, store=object_store)


def test_a_missing_shard_is_named(tmp_path, model, object_store):
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    entry = BaseModelEntry(name="tiny", path=model, max_sequence_length=64)
    with pytest.raises(FailedPreconditionError, match=r"lacks model-2\.safetensors\.$"):
        materialize(entry, cache_dir=tmp_path, store=object_store)
    (model / "model-2.safetensors").write_bytes(b"")
    assert materialize(entry, cache_dir=tmp_path, store=object_store) == model


def test_folders_that_are_no_models_are_refused(tmp_path, model, object_store):
    (model / "config.json").unlink()
    with pytest.raises(FailedPreconditionError, match=r"no config\.json"):
        materialize(BaseModelEntry(name="a", path=model, max_sequence_length=64), cache_dir=tmp_path, store=object_store)
    with pytest.raises(NotFoundError, match="no folder"):
        materialize(BaseModelEntry(name="a", path=tmp_path / "none", max_sequence_length=64), cache_dir=tmp_path, store=object_store)


def test_a_folder_digest_is_remembered_until_a_file_changes(tmp_path, model, monkeypatch):
    memo_dir = tmp_path / "memo"
    assert remembered_sha256(model, memo_dir=memo_dir) is None
    first = folder_sha256(model, memo_dir=memo_dir)
    with monkeypatch.context() as patch:
        patch.setattr("finery_common.catalogue._file_sha256", lambda _: pytest.fail("read again"))
        assert folder_sha256(model, memo_dir=memo_dir) == first
        assert remembered_sha256(model, memo_dir=memo_dir) == first
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(model / "model.safetensors", ns=(1, 1))
    second = folder_sha256(model, memo_dir=memo_dir)
    assert second != first
    (model / ".cache").mkdir()
    (model / ".cache" / "lock").write_text("")
    assert folder_sha256(model, memo_dir=memo_dir) == second
    (model / "config.json").rename(model / "config2.json")
    assert folder_sha256(model, memo_dir=memo_dir) not in {first, second}


def test_only_the_configuration_is_read_wherever_a_model_is(tmp_path, model, object_store, monkeypatch):
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").unlink()
    prefix = f"projects/p{secrets.token_hex(6)}/models/tiny/"
    with object_store.writer(prefix, kind="model") as writer:
        writer.put_folder(model)
        writer.publish(made_from={}, spec={}, attempt="a")
    asked: list[object] = []

    def answer(_: str, **options: object) -> str:
        asked.append(options["allow_patterns"])
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    for place in ({"path": model}, {"s3_prefix": prefix}, {"hub_id": "org/name"}):
        entry = BaseModelEntry(name="tiny", max_sequence_length=64, **place)
        assert read_config(entry, cache_dir=tmp_path / "cache", store=object_store) == {"model_type": "llama"}
    assert asked == [["config.json"]]


@pytest.mark.parametrize(("text", "kind"), [(None, NotFoundError), ("[]", FailedPreconditionError), ("{", FailedPreconditionError)])
def test_a_configuration_that_is_none_is_refused(tmp_path, model, object_store, text, kind):
    path = model / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(kind, match="Base model tiny: .*config.json"):
        read_config(BaseModelEntry(name="tiny", path=model, max_sequence_length=64), cache_dir=tmp_path, store=object_store)


def test_a_folder_that_may_not_be_read_says_so(model, monkeypatch):
    def refused(_: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(model))

    # root may read everything.
    monkeypatch.setattr(Path, "is_dir", refused)
    with pytest.raises(FailedPreconditionError, match=r"tiny may not be read .* `chmod -R a\+rX` it"):
        check_folder(model, name="tiny")
