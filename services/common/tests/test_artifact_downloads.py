"""Download URLs over a real SeaweedFS, folders page by page, parts of objects; and what a store that is full says."""

from __future__ import annotations

import hashlib
import http.server
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import httpx
import pytest
import structlog
from pydantic import ValidationError

from finery_common.artifacts import ArtifactRef, ArtifactStore, DownloadUrl, S3Settings
from finery_common.artifacts.client import S3Client
from finery_common.artifacts.download import attachment
from finery_common.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError, UnavailableError

DATA = secrets.token_bytes(300_000)


@pytest.fixture
def project() -> str:
    return f"projects/test-{secrets.token_hex(6)}/"


def publish(store: ArtifactStore, prefix: str, **objects: bytes) -> ArtifactRef:
    with store.writer(prefix, kind="model") as writer:
        for name, data in objects.items():
            writer.put_bytes(name, data=data)
        return writer.publish(made_from={}, spec={}, attempt="1")


def test_a_download_url_gives_the_object_to_who_has_no_key(object_store, project):
    ref = publish(object_store, f"{project}models/m/", weights=DATA)
    made = object_store.download_url(ref, "weights", lifetime_s=60)
    answer = httpx.get(made.url)
    assert (answer.status_code, hashlib.sha256(answer.content).hexdigest()) == (200, made.entry.sha256)
    assert answer.headers["content-disposition"] == 'attachment; filename="weights"'
    assert answer.headers["content-type"] == "application/octet-stream"
    assert timedelta(seconds=50) < made.expires_at - datetime.now(UTC) <= timedelta(seconds=60)
    rest = httpx.get(made.url, headers={"range": "bytes=299000-"})
    assert (rest.status_code, rest.content) == (206, DATA[299_000:])


def test_a_download_url_opens_nothing_else(object_store, project):
    publish(object_store, f"{project}models/m/", weights=DATA, other=b"x")
    made = object_store.download_url(f"{project}models/m/", "weights", lifetime_s=60)
    assert httpx.get(made.url.replace("/weights?", "/other?")).status_code == 403
    assert httpx.put(made.url, content=b"changed").status_code == 403
    assert httpx.get(made.url.replace("X-Amz-Expires=60", "X-Amz-Expires=6000")).status_code == 403
    assert httpx.get(made.url.partition("?")[0]).status_code == 403


def test_a_download_url_ends_with_its_lifetime_and_with_its_artifact(object_store, project):
    ref = publish(object_store, f"{project}models/m/", weights=DATA)
    short = object_store.download_url(ref, "weights", lifetime_s=1)
    time.sleep(2.1)
    assert httpx.get(short.url).status_code == 403
    longer = object_store.download_url(ref, "weights")
    object_store.delete(ref)
    assert httpx.get(longer.url).status_code == 404
    with pytest.raises(NotFoundError, match="never published or has been deleted"):
        object_store.download_url(ref, "weights")


@pytest.mark.parametrize("lifetime_s", [0, -1, 7 * 24 * 3600 + 1])
def test_a_lifetime_out_of_bounds_is_refused(object_store, project, lifetime_s):
    ref = publish(object_store, f"{project}models/m/", weights=b"x")
    with pytest.raises(InvalidArgumentError, match=r"1 to 604800 \(7 days\)"):
        object_store.download_url(ref, "weights", lifetime_s=lifetime_s)


def test_only_what_the_manifest_names_has_a_download_url(object_store, project):
    ref = publish(object_store, f"{project}models/m/", weights=b"x")
    for name in ("manifest.json", "../../manifest.json", "other"):
        with pytest.raises(NotFoundError, match="it has weights"):
            object_store.download_url(ref, name)


def test_a_download_url_names_the_public_endpoint(object_store, project):
    publish(object_store, f"{project}models/m/", weights=DATA)
    settings = object_store.settings
    # Another name of this host stands for the address that clients go by; as in a proxy, the host is part of what is signed.
    port = settings.endpoint.rpartition(":")[2]
    public = ArtifactStore(S3Client(settings.model_copy(update={"public_endpoint": f"http://localhost:{port}"})))
    made = public.download_url(f"{project}models/m/", "weights")
    assert urlsplit(made.url).netloc == f"localhost:{port}"
    assert httpx.get(made.url).content == DATA
    assert httpx.get(made.url.replace("localhost", "127.0.0.1")).status_code == 403
    secure = ArtifactStore(S3Client(settings.model_copy(update={"public_endpoint": "https://s3.example.com"})))
    assert secure.download_url(f"{project}models/m/", "weights").url.startswith("https://s3.example.com/")


@pytest.mark.parametrize("endpoint", ["s3.example.com", "ftp://s3", "https://s3.example.com/minio", "https://user:pass@s3"])
def test_a_public_endpoint_is_a_scheme_and_a_host(object_store, endpoint):
    with pytest.raises(ValidationError, match="public_endpoint"):
        S3Settings.model_validate(object_store.settings.model_dump() | {"public_endpoint": endpoint})


def test_a_download_url_is_no_part_of_what_is_printed(object_store, project):
    ref = publish(object_store, f"{project}models/m/", weights=b"x")
    made = object_store.download_url(ref, "weights")
    assert isinstance(made, DownloadUrl)
    assert "Signature" in made.url
    assert "Signature" not in repr(made)
    assert made.url not in str(made)


def test_a_file_is_saved_under_its_own_name(object_store, project):
    ref = publish(object_store, f"{project}files/f/", content=b"x")
    made = object_store.download_url(ref, "content", file_name='Zürich "1".jsonl')
    assert httpx.get(made.url).headers["content-disposition"] == attachment('Zürich "1".jsonl')
    assert attachment('Zürich "1".jsonl') == "attachment; filename=\"Z_rich _1_.jsonl\"; filename*=UTF-8''Z%C3%BCrich%20%221%22.jsonl"
    assert attachment("a\r\nSet-Cookie: x") == "attachment; filename=\"a__Set-Cookie_ x\"; filename*=UTF-8''a%0D%0ASet-Cookie%3A%20x"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_folders_come_page_by_page(object_store, project, size):
    ids = ["a", "a0", "b", "ftjob-1", "ftjob-10", "ftjob-2"]
    for name in ids:
        publish(object_store, f"{project}models/{name}/", weights=b"x", other=b"y")
    listed: list[str] = []
    while page := object_store.folders(f"{project}models/", after=listed[-1] if listed else "", limit=size):
        assert len(page) <= size
        listed += page
    assert listed == ids
    assert object_store.folders(f"{project}adapters/", limit=5) == []


@pytest.mark.parametrize("offset", [1, 299_999, 300_000])
def test_an_object_is_read_from_an_offset(object_store, project, offset):
    ref = publish(object_store, f"{project}models/m/", weights=DATA)
    with object_store.open(ref, "weights", offset=offset) as reader:
        assert reader.read() == DATA[offset:]


FULL = [
    (507, "<Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its minimum free drive threshold.</Message></Error>"),
    (400, "<Error><Code>XMinioAdminBucketQuotaExceeded</Code><Message>Bucket quota exceeded</Message></Error>"),
    (403, "<Error><Code>QuotaExceeded</Code><Message></Message></Error>"),
    (507, ""),
]


@pytest.fixture
def answering() -> Iterator[Callable[[int, str], ArtifactStore]]:
    """A store whose every write is answered in the way given; it has nothing stored, and starts uploads in parts."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(status: int, body: str) -> ArtifactStore:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self._answer(status, body)

            def do_POST(self) -> None:
                self._answer(200, "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")

            def do_GET(self) -> None:
                self._answer(
                    200, '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>finery</Name></ListBucketResult>'
                )

            def do_DELETE(self) -> None:
                self._answer(404, "")

            def _answer(self, code: int, text: str) -> None:
                self.send_response(code)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        endpoint = f"127.0.0.1:{server.server_port}"
        return ArtifactStore(S3Client(S3Settings(endpoint=endpoint, access_key="a", secret_key="s", retry_deadline_s=1)))

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "body"), FULL)
def test_a_full_store_says_what_is_needed_and_publishes_nothing(answering, project, status, body):
    store = answering(status, body)
    with store.writer(f"{project}models/m/", kind="model", size_bytes=123_456_789) as writer:
        with pytest.raises(ResourceExhaustedError, match="is full .* 123,456,789 bytes; nothing of it was published") as caught:
            writer.put_bytes("weights", data=b"x")
        assert caught.value.code == "disk_full"
        upload = writer.start_object("parts", part_size_bytes=10)
        with pytest.raises(ResourceExhaustedError, match="123,456,789"):
            upload.write(b"x" * 11)
    assert "Signature" not in str(caught.value)


def test_a_store_that_fails_otherwise_is_not_called_full(answering, project):
    store = answering(400, "<Error><Code>InvalidRequest</Code><Message>no</Message></Error>")
    with store.writer(f"{project}models/m/", kind="model", size_bytes=1) as writer, pytest.raises(UnavailableError, match="InvalidRequest"):
        writer.put_bytes("weights", data=b"x")


def test_a_store_that_speaks_no_tls_is_told_of_at_once_and_its_setting_named(answering):
    settings = answering(503, b"")._client.settings.model_copy(update={"secure": True})
    with structlog.testing.capture_logs() as logs, pytest.raises(UnavailableError, match=r"for 1 s .*SSLError.* FINERY_S3_SECURE is true"):
        ArtifactStore.connect(settings)
    assert [(entry["event"], entry["reason"]) for entry in logs] == [("the object store does not answer; trying again", "SSLError")]
