"""What the project has published, over REST: listed, read in parts, and downloaded straight from the store."""

import hashlib
import json
import secrets

import httpx
import pytest
import structlog

JOB = f"ftjob-{'a' * 24}"
DATA = secrets.token_bytes(200_000)


@pytest.fixture
async def native(world):
    async with httpx.AsyncClient(base_url=f"{world.url}/api/v1", headers={"authorization": f"Bearer {world.api_key}"}) as plain:
        yield plain


@pytest.fixture
async def anybody():
    """A client with no key to the gateway."""
    async with httpx.AsyncClient() as plain:
        yield plain


def publish(world, folder: str, *, kind: str = "model", **objects: bytes) -> None:
    with world.gateway.store.writer(f"projects/{world.project}/{folder}/", kind=kind) as writer:
        for name, data in objects.items():
            writer.put_bytes(name.replace("__", "/"), data=data)
        writer.publish(made_from={"base_model": "b" * 64}, spec={}, attempt="1", metadata={"base_model": "m"})


async def test_artifacts_are_listed_page_by_page(native, world):
    for number in range(5):
        publish(world, f"models/conv-{number}", weights=b"x" * number, config=b"{}")
    with world.gateway.store.writer(f"projects/{world.project}/models/conv-unfinished/", kind="model") as writer:
        writer.put_bytes("weights", data=b"x")
        first = (await native.get("/artifacts/models", params={"page_size": 3})).json()
        second = (await native.get("/artifacts/models", params={"page_size": 3, "page_token": first["next_page_token"]})).json()
        last = (await native.get("/artifacts/models", params={"page_size": 3, "page_token": second["next_page_token"]})).json()
    assert [item["id"] for page in (first, second, last) for item in page["data"]] == [f"conv-{number}" for number in range(5)]
    assert last == {"data": [], "next_page_token": ""}
    shown = first["data"][2]
    assert (shown["kind"], shown["size_bytes"], shown["num_files"], shown["metadata"]) == ("model", 4, 2, {"base_model": "m"})
    assert (await native.get("/artifacts/models/conv-2")).json() == shown


@pytest.mark.parametrize(
    ("folder", "kind", "address"),
    [
        ("models/conv-1", "model", "models/conv-1"),
        (f"adapters/{JOB}-20", "adapter", f"adapters/{JOB}-20"),
        ("datasets/ds-1", "dataset", "datasets/ds-1"),
        (f"runs/{JOB}/metrics", "metrics", f"metrics/{JOB}"),
        (f"runs/{JOB}/checkpoints/20", "checkpoint", f"checkpoints/{JOB}-20"),
    ],
)
async def test_any_artifact_is_downloaded_straight_from_the_store(native, anybody, world, folder, kind, address):
    publish(world, folder, kind=kind, one=DATA, sub__two=b"2")
    files = (await native.get(f"/artifacts/{address}/files")).json()
    assert [(item["name"], item["size_bytes"]) for item in files] == [("one", len(DATA)), ("sub/two", 1)]
    for item, content in zip(files, (DATA, b"2"), strict=True):
        answer = await native.post(f"/artifacts/{address}/files/{item['name']}/download-url")
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        made = answer.json()
        assert made["sha256"] == item["sha256"] == hashlib.sha256(content).hexdigest()
        assert (await anybody.get(made["url"])).content == content
        assert (await native.get(f"/artifacts/{address}/files/{item['name']}")).content == content


async def test_an_uploaded_file_is_saved_under_its_own_name(native, anybody, world):
    file_id = await world.upload(b"{}\n")
    made = (await native.post(f"/artifacts/files/{file_id}/files/content/download-url", json={"lifetime_s": 60})).json()
    answer = await anybody.get(made["url"])
    assert (answer.content, answer.headers["content-disposition"]) == (b"{}\n", 'attachment; filename="rows.jsonl"')
    async with world.client() as client:
        await client.files.delete(file_id)
    assert (await anybody.get(made["url"])).status_code == 404


async def test_a_part_of_a_file_is_read_from_an_offset(native, world):
    publish(world, "models/conv-1", one=DATA)
    whole = await native.get("/artifacts/models/conv-1/files/one")
    assert (whole.status_code, whole.headers["etag"]) == (200, f'"{hashlib.sha256(DATA).hexdigest()}"')
    part = await native.get("/artifacts/models/conv-1/files/one", headers={"range": "bytes=199990-"})
    assert (part.status_code, part.content) == (206, DATA[199_990:])
    assert part.headers["content-range"] == "bytes 199990-199999/200000"
    behind = await native.get("/artifacts/models/conv-1/files/one", headers={"range": "bytes=200000-"})
    assert (behind.status_code, behind.json()["error"]["code"]) == (416, "range_not_satisfiable")
    # Other ranges may be ignored, and are.
    assert (await native.get("/artifacts/models/conv-1/files/one", headers={"range": "bytes=0-9"})).content == DATA


async def test_another_project_has_none_of_it(native, world):
    publish(world, "models/conv-1", one=DATA)
    _, key = await world.gateway.keys.create(f"{world.project}-other")
    async with httpx.AsyncClient(base_url=f"{world.url}/api/v1", headers={"authorization": f"Bearer {key}"}) as other:
        assert (await other.get("/artifacts/models")).json()["data"] == []
        for answer in (
            await other.get("/artifacts/models/conv-1"),
            await other.get("/artifacts/models/conv-1/files"),
            await other.get("/artifacts/models/conv-1/files/one"),
            await other.post("/artifacts/models/conv-1/files/one/download-url"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    async with httpx.AsyncClient(base_url=f"{world.url}/api/v1") as nobody:
        assert (await nobody.post("/artifacts/models/conv-1/files/one/download-url")).status_code == 401


@pytest.mark.parametrize(
    ("address", "status", "text"),
    [
        ("models/conv-1/files/other", 404, "it has one"),
        ("models/conv-1/files/manifest.json", 404, "it has one"),
        ("models/conv-1/files/..%2F..%2Fconv-1%2Fone", 404, "it has one"),
        ("models/..%2Fadapters/files/one", 404, ""),
        ("models/.hidden/files/one", 400, "artifact_id"),
        ("checkpoints/nonsense/files/one", 404, "job and step"),
        ("secrets/conv-1/files/one", 400, "collection"),
    ],
)
async def test_what_is_not_there_says_so(native, world, address, status, text):
    publish(world, "models/conv-1", one=DATA)
    for answer in (await native.get(f"/artifacts/{address}"), await native.post(f"/artifacts/{address}/download-url")):
        assert answer.status_code == status
        assert text in json.dumps(answer.json())


@pytest.mark.parametrize("lifetime_s", [0, 604_801, 1.5, "60", None])
async def test_a_lifetime_out_of_bounds_names_its_field(native, world, lifetime_s):
    publish(world, "models/conv-1", one=DATA)
    answer = await native.post("/artifacts/models/conv-1/files/one/download-url", json={"lifetime_s": lifetime_s})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lifetime_s")


async def test_no_line_of_the_log_has_a_download_url(native, world, capfd, caplog):
    publish(world, "models/conv-1", one=DATA)
    caplog.set_level("DEBUG")
    with structlog.testing.capture_logs() as lines:
        made = (await native.post("/artifacts/models/conv-1/files/one/download-url")).json()
    signature = made["url"].partition("X-Amz-Signature=")[2]
    assert len(signature) == 64
    assert any(line.get("route", "").endswith("/download-url") for line in lines)
    out, err = capfd.readouterr()
    for text in (json.dumps(lines, default=str), caplog.text, out, err):
        assert signature not in text
