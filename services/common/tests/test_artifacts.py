"""Artifacts over a real SeaweedFS: published once, verified on the way out, never rewritten."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from minio import Minio

from finery_common.artifacts import ArtifactRef, ArtifactStore, Manifest, ObjectEntry, put_chunks, remove_unfinished
from finery_common.artifacts.client import S3Client
from finery_common.artifacts.manifest import MAX_MANIFEST_BYTES, parse_manifest
from finery_common.artifacts.upload import ObjectUpload
from finery_common.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)


@pytest.fixture
def project() -> str:
    return f"projects/test-{secrets.token_hex(6)}/"


@pytest.fixture
def minio(object_store: ArtifactStore) -> Minio:
    """A client of the test's own, to do what Finery never does."""
    s3 = object_store.settings
    return Minio(s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key, secure=False, region=s3.region)


def publish(store: ArtifactStore, prefix: str, **objects: bytes) -> ArtifactRef:
    with store.writer(prefix, kind="file") as writer:
        for name, data in objects.items():
            writer.put_bytes(name, data=data)
        return writer.publish(made_from={"dataset": "0" * 64}, spec={"rank": 16}, attempt="1", metadata={"filename": "ä.jsonl"})


def keys(store: ArtifactStore, minio: Minio, prefix: str) -> list[str]:
    return [item.object_name or "" for item in minio.list_objects(store.settings.bucket, prefix=prefix, recursive=True)]


def test_what_was_published_is_read_back(object_store, project):
    ref = publish(object_store, f"{project}files/a/", one=b"1", empty=b"")
    manifest = object_store.manifest(ref)
    assert [(entry.name, entry.size_bytes, entry.sha256) for entry in manifest.objects] == [
        ("empty", 0, hashlib.sha256(b"").hexdigest()),
        ("one", 1, hashlib.sha256(b"1").hexdigest()),
    ]
    assert (manifest.kind, manifest.made_from, manifest.spec, manifest.attempt) == ("file", {"dataset": "0" * 64}, {"rank": 16}, "1")
    assert manifest.metadata == {"filename": "ä.jsonl"}
    assert object_store.ref(ref.prefix) == ref
    assert ref.size_bytes == 1
    with object_store.open(ref, "one") as reader:
        assert reader.read() == b"1"
    with object_store.open(ref, "empty") as reader:
        assert reader.read() == b""


def test_an_artifact_does_not_exist_before_its_manifest(object_store, project, minio):
    prefix = f"{project}files/a/"
    with object_store.writer(prefix, kind="file") as writer:
        writer.put_bytes("one", data=b"1")
        assert not object_store.exists(prefix)
        with pytest.raises(NotFoundError, match="never published"):
            object_store.manifest(prefix)
    assert keys(object_store, minio, prefix) == []


def test_a_second_publication_loses_and_leaves_the_first_untouched(object_store, project, minio):
    prefix = f"{project}files/a/"
    ref = publish(object_store, prefix, one=b"first")
    before = keys(object_store, minio, prefix)
    with pytest.raises(AlreadyExistsError, match="published by attempt '1'"):
        publish(object_store, prefix, one=b"second")
    assert object_store.ref(prefix) == ref
    assert object_store.open(ref, "one").read() == b"first"
    assert keys(object_store, minio, prefix) == before


def test_publishing_the_same_manifest_again_gives_the_same_reference(object_store, project):
    with object_store.writer(f"{project}files/a/", kind="file") as writer:
        writer.put_bytes("one", data=b"1")
        first = writer.publish(made_from={}, spec={}, attempt="1")
        assert writer.publish(made_from={}, spec={}, attempt="1") == first


def test_one_of_many_writers_wins(object_store, project):
    for round_number in range(3):
        prefix = f"{project}files/{round_number}/"
        barrier = threading.Barrier(8)

        def race(number: int, prefix: str = prefix, barrier: threading.Barrier = barrier) -> ArtifactRef | None:
            writer = object_store.writer(prefix, kind="file")
            writer.put_bytes("one", data=str(number).encode())
            barrier.wait()
            try:
                return writer.publish(made_from={}, spec={}, attempt=str(number))
            except AlreadyExistsError:
                return None

        with ThreadPoolExecutor(8) as pool:
            winners = [(number, ref) for number, ref in enumerate(pool.map(race, range(8))) if ref]
        assert len(winners) == 1
        number, ref = winners[0]
        assert object_store.ref(prefix) == ref
        assert object_store.open(ref, "one").read() == str(number).encode()


def test_an_object_name_is_taken_once(object_store, project):
    with object_store.writer(f"{project}files/a/", kind="file") as writer:
        writer.put_bytes("one", data=b"1")
        with pytest.raises(AlreadyExistsError, match="written once"):
            writer.put_bytes("one", data=b"2")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../b", "a//b", ".hidden", "a\\b", "ü"])
def test_unsafe_object_names_are_refused(object_store, project, name):
    with object_store.writer(f"{project}files/a/", kind="file") as writer, pytest.raises(InvalidArgumentError, match="object name"):
        writer.put_bytes(name, data=b"")


@pytest.mark.parametrize(
    "prefix", ["", "projects/p/", "projects/p/files/", "projects/p/files/a", "projects/p/files/../x/", "other/p/files/a/"]
)
def test_prefixes_outside_the_layout_can_be_neither_written_nor_deleted(object_store, prefix):
    with pytest.raises(InvalidArgumentError, match="artifact prefix"):
        object_store.writer(prefix, kind="file")
    with pytest.raises(InvalidArgumentError, match="artifact prefix"):
        object_store.delete(prefix)


def test_a_large_stream_goes_up_in_parts_and_comes_back_whole(object_store, project):
    data = secrets.token_bytes(1 << 20) * 40
    with object_store.writer(f"{project}files/a/", kind="file") as writer:
        entry = writer.put_stream("big", file=io.BytesIO(data))
        ref = writer.publish(made_from={}, spec={}, attempt="1")
    assert (entry.size_bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    with io.BufferedReader(object_store.open(ref, "big")) as reader:
        assert reader.read() == data


@pytest.mark.parametrize("size_bytes", [0, 1, 99, 100, 101, 200, 250])
def test_every_byte_is_sent_whatever_the_part_size(size_bytes):
    class Recorder:
        def put(self, key, data):
            self.parts = [data]

        def start_multipart(self, key):
            self.parts = []
            return "id"

        def put_part(self, key, *, upload_id, number, data):
            assert len(data) <= 100
            self.parts.append(data)
            return str(number)

        def finish_multipart(self, key, *, upload_id, etags, size_bytes):
            assert etags == [str(number + 1) for number in range(len(self.parts))]

    data = secrets.token_bytes(size_bytes)
    recorder = Recorder()
    upload = ObjectUpload(recorder, key="k", name="n", part_size_bytes=100)
    for start in range(0, size_bytes, 33):
        upload.write(data[start : start + 33])
    entry = upload.finish()
    assert b"".join(recorder.parts) == data
    assert (entry.size_bytes, entry.sha256) == (size_bytes, hashlib.sha256(data).hexdigest())


async def test_an_async_stream_is_stored(object_store, project):
    async def chunks():
        for _ in range(40):
            yield b"x" * (1 << 20)

    with object_store.writer(f"{project}files/a/", kind="file") as writer:
        await put_chunks(writer, "big", chunks=chunks())
        ref = writer.publish(made_from={}, spec={}, attempt="1")
    assert ref.size_bytes == 40 << 20
    assert object_store.open(ref, "big").readall() == b"x" * (40 << 20)


async def test_a_client_that_hangs_up_leaves_nothing(object_store, project, minio):
    async def chunks():
        for _ in range(20):
            yield b"x" * (1 << 20)
        raise ConnectionResetError("hung up")

    prefix = f"{project}files/a/"
    with pytest.raises(ConnectionResetError), object_store.writer(prefix, kind="file") as writer:
        await put_chunks(writer, "big", chunks=chunks())
    assert not object_store.exists(prefix)
    assert keys(object_store, minio, prefix) == []
    uploads = minio._list_multipart_uploads(object_store.settings.bucket, prefix=prefix).uploads
    assert uploads == []


def test_a_fetch_gives_a_folder_that_later_fetches_share(object_store, project, tmp_path):
    with object_store.writer(f"{project}models/a/", kind="model") as writer:
        (tmp_path / "in" / "sub").mkdir(parents=True)
        (tmp_path / "in" / "config.json").write_text("{}")
        (tmp_path / "in" / "sub" / "weights").write_bytes(b"w")
        writer.put_folder(tmp_path / "in")
        ref = writer.publish(made_from={}, spec={}, attempt="1")
    folder = object_store.fetch(ref, tmp_path / "cache")
    assert folder == tmp_path / "cache" / ref.manifest_sha256
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == ["config.json", "sub/weights"]
    inode = folder.stat().st_ino
    assert object_store.fetch(ref.prefix, tmp_path / "cache") == folder
    assert folder.stat().st_ino == inode
    object_store.delete(ref)
    assert object_store.fetch(ref, tmp_path / "cache") == folder


def test_fetches_at_once_stage_one_copy(object_store, project, tmp_path):
    ref = publish(object_store, f"{project}files/a/", one=b"1" * 100_000, two=b"2")
    with ThreadPoolExecutor(6) as pool:
        folders = set(pool.map(lambda _: object_store.fetch(ref, tmp_path), range(6)))
    assert folders == {tmp_path / ref.manifest_sha256}
    assert (tmp_path / ref.manifest_sha256 / "one").read_bytes() == b"1" * 100_000
    assert list(tmp_path.glob("*.staging")) == []


def test_what_a_killed_process_staged_is_not_taken_for_a_copy(object_store, project, tmp_path):
    ref = publish(object_store, f"{project}files/a/", one=b"whole")
    staging = tmp_path / f".{ref.manifest_sha256}.staging"
    staging.mkdir()
    (staging / "one").write_bytes(b"ha")
    (staging / "foreign").write_bytes(b"")
    folder = object_store.fetch(ref, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["one"]
    assert (folder / "one").read_bytes() == b"whole"


def test_locks_and_what_killed_processes_staged_do_not_stay(object_store, project, tmp_path):
    ref = publish(object_store, f"{project}files/a/", one=b"whole")
    object_store.fetch(ref, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ref.manifest_sha256]
    for digest in ("0" * 64, "1" * 64):
        (tmp_path / f".{digest}.staging").mkdir()
        (tmp_path / f".{digest}.staging" / "one").write_bytes(b"ha")
    (tmp_path / f".{'0' * 64}.lock").touch()
    with (tmp_path / f".{'1' * 64}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_unfinished(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {ref.manifest_sha256, f".{'1' * 64}.staging", f".{'1' * 64}.lock"}
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ref.manifest_sha256]


def test_what_a_manifest_is_checked_for_is_asked_before_anything_is_copied(object_store, project, tmp_path):
    ref = publish(object_store, f"{project}files/a/", one=b"1")

    def check(manifest):
        assert [entry.name for entry in manifest.objects] == ["one"]
        raise InvalidArgumentError("no")

    with pytest.raises(InvalidArgumentError):
        object_store.fetch(ref, tmp_path / "cache", check=check)
    assert not (tmp_path / "cache").exists()


def test_a_manifest_past_its_bound_is_neither_read_nor_published(object_store, project, minio, monkeypatch):
    ref = publish(object_store, f"{project}files/a/", one=b"1")
    folder, large = ref.prefix + object_store.manifest(ref).folder, b" " * (MAX_MANIFEST_BYTES + 1)
    minio.put_object(object_store.settings.bucket, ref.prefix + "manifest.json", io.BytesIO(large), len(large))
    with pytest.raises(DataLossError, match="more than"):
        object_store.manifest(ref)
    assert folder not in object_store.sweep(older_than_s=-60.0), "it may be restored"
    monkeypatch.setattr("finery_common.artifacts.writer.MAX_MANIFEST_BYTES", 10)
    with pytest.raises(InvalidArgumentError, match="fewer objects"):
        publish(object_store, f"{project}files/b/", one=b"1")


def test_an_object_that_claims_to_be_compressed_is_taken_as_it_is_stored(object_store, project, minio, tmp_path):
    packed = gzip.compress(b" " * 1_000_000)
    ref = publish(object_store, f"{project}files/a/", one=packed)
    key = ref.prefix + object_store.manifest(ref).folder + "one"
    claim = {"Content-Encoding": "gzip"}
    minio.put_object(object_store.settings.bucket, key, io.BytesIO(packed), len(packed), metadata=claim)
    assert (object_store.fetch(ref, tmp_path) / "one").read_bytes() == packed


@pytest.mark.parametrize("names", [["../a"], ["a/../../b"], ["/a"], ["a\0b"], ["a" * 5000], ["a", "a"], ["a", "a/b"], ["a//b"]])
def test_a_manifest_with_names_that_are_no_files_of_one_folder_is_none(names):
    entries = tuple(ObjectEntry(name=name, size_bytes=1, sha256="0" * 64) for name in names)
    made = Manifest(
        kind="file",
        folder=f"objects/{'0' * 32}/",
        objects=entries,
        made_from={},
        spec={},
        attempt="1",
        metadata={},
        created_at=datetime.now(UTC),
    )
    with pytest.raises(DataLossError, match="object name") as caught:
        parse_manifest(made.to_bytes(), key="manifest.json")
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("bad", [b"eviL", b"sho", b"too long"])
def test_a_damaged_object_never_enters_a_cache(object_store, project, minio, tmp_path, bad):
    ref = publish(object_store, f"{project}files/a/", one=b"evil")
    key = ref.prefix + object_store.manifest(ref).folder + "one"
    minio.put_object(object_store.settings.bucket, key, io.BytesIO(bad), len(bad))
    with pytest.raises(DataLossError, match="damaged"):
        object_store.fetch(ref, tmp_path)
    assert not (tmp_path / ref.manifest_sha256).exists()
    with pytest.raises(DataLossError, match="damaged"), object_store.open(ref, "one") as reader:
        reader.readall()


def test_a_replaced_manifest_is_noticed_by_its_reference(object_store, project, minio):
    ref = publish(object_store, f"{project}files/a/", one=b"1")
    forged = object_store.manifest(ref).model_copy(update={"attempt": "forged"}).to_bytes()
    minio.put_object(object_store.settings.bucket, ref.prefix + "manifest.json", io.BytesIO(forged), len(forged))
    with pytest.raises(DataLossError, match="not what was published"):
        object_store.manifest(ref)


def test_a_full_disk_says_what_was_needed_and_what_was_free(object_store, project, tmp_path, monkeypatch):
    ref = publish(object_store, f"{project}files/a/", one=b"1")
    usage = type("Usage", (), {"free": 3 << 20})
    monkeypatch.setattr("finery_common.artifacts.cache.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceExhaustedError, match=r"16 MiB needed, 3 MiB free in .*FINERY_CACHE_DIR"):
        object_store.fetch(ref, tmp_path)


def test_an_unknown_object_is_named_with_those_there_are(object_store, project):
    ref = publish(object_store, f"{project}files/a/", one=b"1")
    with pytest.raises(NotFoundError, match="has no object 'two'; it has one"):
        object_store.open(ref, "two")


def test_a_list_shows_what_is_published_below_a_prefix(object_store, project):
    first, second = publish(object_store, f"{project}files/a/", manifest=b"1"), publish(object_store, f"{project}files/b/", one=b"1")
    publish(object_store, f"{project}datasets/c/", one=b"1")
    unpublished = object_store.writer(f"{project}files/d/", kind="file")
    unpublished.put_bytes("manifest.json", data=b"{}")
    assert list(object_store.list(f"{project}files/")) == [first, second]


def test_a_deleted_artifact_is_gone_with_its_objects(object_store, project, minio):
    ref, other = publish(object_store, f"{project}files/a/", one=b"1"), publish(object_store, f"{project}files/ab/", one=b"1")
    object_store.delete(ref)
    object_store.delete(ref)
    assert keys(object_store, minio, ref.prefix) == []
    with pytest.raises(NotFoundError, match="has been deleted"):
        object_store.manifest(ref)
    assert object_store.exists(other)


def test_a_sweep_removes_old_objects_without_a_manifest_and_nothing_else(object_store, project, minio):
    ref = publish(object_store, f"{project}files/a/", one=b"1")
    dead = object_store.writer(f"{project}files/dead/", kind="file")
    dead.put_bytes("one", data=b"1")
    loser = object_store.writer(ref.prefix, kind="file")
    loser.put_bytes("one", data=b"1")
    before = keys(object_store, minio, project)
    object_store.sweep()
    assert keys(object_store, minio, project) == before
    removed = object_store.sweep(older_than_s=-60.0)
    assert {dead.prefix + dead.folder, ref.prefix + loser.folder} <= set(removed)
    assert object_store.open(ref, "one").read() == b"1"
    assert len(keys(object_store, minio, project)) == 2


def test_a_swept_writer_cannot_publish_what_is_gone(object_store, project):
    writer = object_store.writer(f"{project}files/a/", kind="file")
    writer.put_bytes("one", data=b"1")
    object_store.delete(writer.prefix)
    with pytest.raises(DataLossError, match="1 objects are not in the store as written, such as one"):
        writer.publish(made_from={}, spec={}, attempt="1")
    assert not object_store.exists(writer.prefix)


def test_a_store_that_ignores_conditions_is_refused(object_store):
    class Careless(S3Client):
        def put_new(self, key, data):
            self.put(key, data)
            return True

    with pytest.raises(FailedPreconditionError, match="ignores 'If-None-Match: \\*'"):
        ArtifactStore(Careless(object_store.settings)).probe_conditional_writes()


def test_wrong_keys_are_named_and_no_key_is_shown(object_store):
    wrong = object_store.settings.model_copy(update={"secret_key": "not-the-key"})
    with pytest.raises(FailedPreconditionError, match=r"refused the keys .*FINERY_S3_SECRET_KEY") as caught:
        ArtifactStore.connect(wrong)
    assert "not-the-key" not in str(caught.value)
    assert "not-the-key" not in repr(wrong)
