"""Files through the official client, the real store and a real port."""

import asyncio
import hashlib
import secrets
from datetime import UTC, datetime, timedelta

import httpx
import openai
import pytest
import sqlalchemy as sa

from finery.common.v1 import job_pb2
from finery_common.errors import NotFoundError
from finery_gateway.creates import Attempt, Creates
from finery_gateway.files import Files, StoredFile
from finery_gateway.multipart import FormReader
from finery_gateway.tables import FileRow, migrate

ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 20


async def test_a_file_goes_in_and_comes_out_unchanged(client, world):
    made = await client.files.create(file=("größe.jsonl", ROWS), purpose="fine-tune")
    assert (made.bytes, made.filename, made.purpose, made.status, made.object) == (
        len(ROWS),
        "größe.jsonl",
        "fine-tune",
        "processed",
        "file",
    )
    assert (await client.files.retrieve(made.id)) == made
    assert (await client.files.content(made.id)).content == ROWS
    manifest = world.gateway.store.manifest(f"projects/{world.project}/files/{made.id}/")
    assert manifest.kind == "file"
    assert manifest.metadata["filename"] == "größe.jsonl"
    assert [entry.name for entry in manifest.objects] == ["content"]


async def test_a_file_larger_than_a_part_is_stored_whole(client):
    content = b"0123456789abcdef" * (18 * 1024 * 1024 // 16)
    made = await client.files.create(file=("large.jsonl", content), purpose="fine-tune")
    digest = hashlib.sha256()
    async with client.files.with_streaming_response.content(made.id) as response:
        async for chunk in response.iter_bytes():
            digest.update(chunk)
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()


async def test_the_file_part_may_come_before_the_purpose(world):
    async with httpx.AsyncClient(base_url=world.url, headers={"authorization": f"Bearer {world.api_key}"}) as plain:
        body = (
            b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nrow\r\n'
            b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n'
        )
        answer = await plain.post("/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 200
    assert answer.json()["bytes"] == 3


async def test_files_are_listed_by_age_in_pages(client):
    made = [(await client.files.create(file=(f"{n}.jsonl", ROWS), purpose="fine-tune")).id for n in range(3)]
    assert [file.id async for file in client.files.list()] == made[::-1]
    assert [file.id async for file in client.files.list(order="asc", limit=2)] == made
    assert [file.id for file in (await client.files.list(after=made[2], limit=1)).data] == [made[1]]
    assert [file.id async for file in client.files.list(purpose="batch")] == []
    with pytest.raises(openai.BadRequestError, match="after"):
        await client.files.list(after="file-unknown")


async def test_a_deleted_file_is_gone_and_its_bytes_too(client, world):
    made = await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune")
    assert (await client.files.delete(made.id)).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            await call(made.id)
        assert made.id in caught.value.message
    assert not world.gateway.store.exists(f"projects/{world.project}/files/{made.id}/")
    assert [file.id async for file in client.files.list()] == []


async def test_a_file_that_a_job_or_a_dataset_in_the_making_needs_is_kept(client, world):
    file_id = await world.upload(ROWS)
    job = await client.fine_tuning.jobs.create(model="SmolLM2-135M-Instruct", training_file=file_id)
    with pytest.raises(openai.ConflictError, match=job.id):
        await client.files.delete(file_id)
    world.training.job(job.id).state = job_pb2.JOB_STATE_SUCCEEDED
    spec = {"file": file_id, "base_model": "SmolLM2-135M-Instruct"}
    headers = {"authorization": f"Bearer {world.api_key}"}
    async with httpx.AsyncClient(base_url=world.url, headers=headers) as plain:
        dataset = (await plain.post("/api/v1/datasets", json=spec)).json()
    with pytest.raises(openai.ConflictError, match=dataset["id"]):
        await client.files.delete(file_id)
    world.datasets.datasets[dataset["name"]].state = job_pb2.JOB_STATE_SUCCEEDED
    assert (await client.files.delete(file_id)).deleted


async def test_an_empty_file_another_purpose_and_unknown_fields_are_refused(client, world):
    with pytest.raises(openai.BadRequestError, match="empty"):
        await client.files.create(file=("a.jsonl", b""), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="wanted 'fine-tune'"):
        await client.files.create(file=("a.jsonl", ROWS), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
    with pytest.raises(openai.BadRequestError, match="frobnicate: unknown field"):
        await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune", extra_body={"frobnicate": "1"})
    assert list(world.gateway.store.list(f"projects/{world.project}/files/")) == []


async def test_a_file_over_the_limit_gets_413_and_leaves_nothing(client, world):
    with pytest.raises(openai.APIStatusError) as caught:
        await client.files.create(file=("a.jsonl", b"x" * (40 * 1024 * 1024 + 1)), purpose="fine-tune")
    assert caught.value.status_code == 413
    assert "FINERY_UPLOAD_LIMIT_BYTES" in caught.value.message

    async def endless():
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(41):
            yield b"x" * (1024 * 1024)

    headers = {"authorization": f"Bearer {world.api_key}", "content-type": "multipart/form-data; boundary=b"}
    async with httpx.AsyncClient(base_url=world.url, headers=headers) as plain:
        answer = await plain.post("/v1/files", content=endless())
    assert answer.status_code == 413
    assert _keys(world) == []


async def test_a_client_that_hangs_up_in_the_middle_leaves_nothing(world, client):
    port = int(world.url.rsplit(":", 1)[1])
    _reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {world.api_key}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 39000000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    )
    writer.write(head.encode() + b"x" * (20 * 1024 * 1024))
    await writer.drain()
    async with asyncio.timeout(20):
        await _until(lambda: bool(_uploads(world)))
        writer.close()
        await writer.wait_closed()
        await _until(lambda: not _uploads(world))
    assert _keys(world) == []
    assert [file.id async for file in client.files.list()] == []


@pytest.mark.parametrize(
    ("content_type", "body", "words"),
    [
        ("application/json", b"{}", "multipart/form-data"),
        ("multipart/form-data; boundary=b", b"--b--\r\n", "file: missing"),
        ("multipart/form-data; boundary=b", b"garbage", "multipart"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nrow\r\n--b--\r\n',
            "purpose: missing",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nrow',
            "ended before its closing boundary",
        ),
    ],
    ids=["not-multipart", "no-file", "garbage", "no-purpose", "truncated"],
)
async def test_a_broken_form_is_refused_and_leaves_nothing(world, content_type, body, words):
    headers = {"authorization": f"Bearer {world.api_key}", "content-type": content_type}
    async with httpx.AsyncClient(base_url=world.url, headers=headers) as plain:
        answer = await plain.post("/v1/files", content=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert _keys(world) == []


async def test_one_project_never_sees_anothers_files(client, stranger, world):
    file_id = await world.upload(ROWS)
    for call in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
        with pytest.raises(openai.NotFoundError):
            await call(file_id)
    assert [file.id async for file in stranger.files.list()] == []
    assert (await client.files.retrieve(file_id)).id == file_id


async def test_a_repeated_upload_gives_the_file_that_exists(client, world):
    first = await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune")
    again = await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune", extra_headers={"x-stainless-retry-count": "1"})
    assert again.id == first.id
    other = await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune")
    assert other.id != first.id
    assert len(list(world.gateway.store.list(f"projects/{world.project}/files/"))) == 2


async def test_an_idempotency_key_names_one_upload(client, world):
    key = {"idempotency-key": "k1"}
    first = await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune", extra_headers=key)
    assert (await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune", extra_headers=key)).id == first.id
    with pytest.raises(openai.ConflictError, match="Idempotency-Key"):
        await client.files.create(file=("a.jsonl", ROWS + b"\n"), purpose="fine-tune", extra_headers=key)
    assert [file.id async for file in client.files.list()] == [first.id]
    assert len(list(world.gateway.store.list(f"projects/{world.project}/files/"))) == 1


async def test_files_live_the_same_life_on_both_databases(database, object_store):
    await migrate(database)
    project = f"p-{secrets.token_hex(6)}"
    files = Files(database, store=object_store, creates=Creates(database), limit_bytes=1000)

    async def upload(name: str, attempt: Attempt) -> StoredFile:
        body = f'--b\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n\r\nrow\r\n'
        body += '--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n'

        async def stream():
            yield body.encode()

        form = FormReader(stream(), content_type="multipart/form-data; boundary=b", file_limit_bytes=1000)
        return await files.create(project, form=form, attempt=attempt)

    first, second = await upload("a", Attempt("k")), await upload("b", Attempt())
    assert await upload("a", Attempt("k")) == first
    found = await files.list(project, after=None, limit=1, order="asc", purpose=None)
    assert (found.files, found.has_more) == ((first,), True)
    await files.delete(project, file_id=second.id, users=_nobody)
    with pytest.raises(NotFoundError):
        await files.get(project, file_id=second.id)


async def test_what_a_dead_process_left_half_done_is_settled(world, client):
    published, unpublished, deleting = [await world.upload() for _ in range(3)]
    prefix = f"projects/{world.project}/files/"
    world.gateway.store.delete(f"{prefix}{unpublished}/")
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    async with world.gateway.db.begin() as session:
        await session.execute(sa.update(FileRow).where(FileRow.id != deleting).values(state="publishing", created_at=long_ago))
        await session.execute(sa.update(FileRow).where(FileRow.id == deleting).values(state="deleting"))
    await world.gateway.files.settle()
    assert [file.id async for file in client.files.list()] == [published]
    assert not world.gateway.store.exists(f"{prefix}{deleting}/")


async def _nobody() -> tuple[str, ...]:
    return ()


async def _until(condition) -> None:
    while not condition():  # noqa: ASYNC110 - the store tells in no other way
        await asyncio.sleep(0.05)


def _keys(world) -> list[str]:
    return [item.key for item in world.gateway.store._client.list(f"projects/{world.project}/")]


def _uploads(world) -> list[str]:
    minio = world.gateway.store._client._minio
    answer = minio._list_multipart_uploads(world.gateway.store.settings.bucket, prefix=f"projects/{world.project}/")
    return [upload.object_name for upload in answer.uploads]
