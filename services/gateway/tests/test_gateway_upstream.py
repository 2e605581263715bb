"""The client of vLLM's HTTP against a server that writes bytes by hand."""

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import sys

import certifi
import pytest

from finery_common.errors import FailedPreconditionError
from finery_common.tls import Trust
from finery_gateway import upstream
from finery_gateway.upstream import Upstream, UpstreamError, UpstreamTimeoutError

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n1;x=y\r\n,\r\nA\r\n 123456789\r\n0\r\nx-trailer: 1\r\n\r\n"
)
SIZED = b"HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\nhello"


class Server:
    """Answers every request with `parts`, one write each, and closes where `closes`."""

    def __init__(self, path):
        self.address = f"unix://{path}"
        self.path = path
        self.parts, self.closes, self.gone = [b""], False, asyncio.Event()
        self.requests, self.connections, self.tasks = [], 0, set()

    async def serve(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(size))
                for part in self.parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.closes:
                    break
        self.gone.set()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture
async def server(tmp_path):
    made = Server(str(tmp_path / "s"))
    listening = await asyncio.start_unix_server(made.serve, made.path)
    yield made
    listening.close()
    # Every client has cut or closed its connections, which ends them.
    async with asyncio.timeout(5):
        await asyncio.gather(*made.tasks)


@pytest.fixture
async def client(server):
    made = Upstream(server.address, timeout_s=5)
    yield made
    made.close()


async def ask(client):
    answer = await client.post("/v1/x", headers={"x-a": "1"}, body=b"{}")
    body = b""
    try:
        while piece := await answer.read():
            body += piece
    finally:
        answer.close()
    return answer, body


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 1000])
async def test_a_chunked_answer_is_whole_however_it_is_split(server, client, size):
    server.parts = [CHUNKED[start : start + size] for start in range(0, len(CHUNKED), size)]
    answer, body = await ask(client)
    assert (answer.status, answer.headers["content-type"], body) == (200, "text/event-stream", b"hello, 123456789")
    assert server.requests == [b"POST /v1/x HTTP/1.1\r\nhost: vllm\r\nx-a: 1\r\ncontent-length: 2\r\n\r\n{}"]


async def test_a_connection_is_used_again_after_whole_answers_of_every_kind(server, client):
    no_body = b"HTTP/1.1 204 No Content\r\n\r\n"
    empty = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
    for parts, status, whole in (
        ([SIZED], 201, b"hello"),
        ([CHUNKED], 200, b"hello, 123456789"),
        ([no_body], 204, b""),
        ([empty], 200, b""),
    ):
        server.parts = parts
        answer, body = await ask(client)
        assert (answer.status, body) == (status, whole)
    assert server.connections == 1


async def test_an_answer_without_length_ends_with_its_connection(server, client):
    server.parts, server.closes = [b"HTTP/1.1 200 OK\r\n\r\nhel", b"lo"], True
    assert (await ask(client))[1] == b"hello"
    assert (await ask(client))[1] == b"hello"
    assert server.connections == 2


async def test_an_answer_left_unread_cuts_the_connection(server, client):
    server.parts = [CHUNKED[:90]]
    answer = await client.post("/v1/x", headers={}, body=b"")
    answer.close()
    async with asyncio.timeout(5):
        await server.gone.wait()
    server.parts = [SIZED]
    await ask(client)
    assert server.connections == 2


async def test_an_idle_connection_that_was_closed_is_replaced_without_a_word(server, client):
    server.parts = [SIZED]
    await ask(client)
    # Closed by the server at the very moment of the next request.
    server.parts, server.closes = [b""], True
    asked = asyncio.create_task(ask(client))
    async with asyncio.timeout(5):
        await server.gone.wait()
    server.parts = [SIZED]
    assert (await asked)[1] == b"hello"
    assert server.connections == 2


async def test_an_idle_connection_is_not_kept_for_long(server, client, monkeypatch):
    server.parts = [SIZED]
    await ask(client)
    monkeypatch.setattr(upstream, "IDLE_S", 0.0)
    await ask(client)
    assert server.connections == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhel",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1" * 70_000,
        b"x" * 70_000,
    ],
    ids=range(11),
)
async def test_what_is_broken_is_an_error(server, client, raw):
    server.parts, server.closes = [raw], True
    with pytest.raises(UpstreamError):
        await ask(client)


async def test_silence_is_a_timeout(server):
    server.parts = [CHUNKED[:90]]
    client = Upstream(server.address, timeout_s=0.05)
    with pytest.raises(UpstreamTimeoutError):
        await ask(client)


async def test_nobody_there_is_an_error():
    with pytest.raises(UpstreamError):
        await ask(Upstream("unix:///nowhere/s", timeout_s=1))
    with pytest.raises(UpstreamError):
        await ask(Upstream("http://127.0.0.1:1", timeout_s=1))


async def test_a_tls_port_is_asked_where_its_certificate_is_vllms(tmp_path, vllm_certificate):
    certificate, key = vllm_certificate
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    server = Server(tmp_path / "s")
    server.parts = [SIZED]
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=serving)
    address = f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    authorities = tmp_path / "ca.crt"
    shutil.copy(certifi.where(), authorities)
    client = Upstream(address, timeout_s=5, tls=Trust(authorities))
    with pytest.raises(UpstreamError, match="CERTIFICATE_VERIFY_FAILED"):
        await ask(client)
    # The certificate and who signs it are renewed while the gateway runs.
    shutil.copy(certificate, authorities)
    answer, body = await ask(client)
    assert (answer.status, body) == (201, b"hello")
    client.close()
    with pytest.raises(UpstreamError, match="FINERY_VLLM_CA_FILE is not set"):
        await ask(Upstream(address, timeout_s=5))
    listening.close()


def test_a_file_of_authorities_that_is_none_is_named(tmp_path):
    (tmp_path / "ca.crt").write_text("nothing")
    for file in (tmp_path / "ca.crt", tmp_path / "missing"):
        with pytest.raises(FailedPreconditionError, match=f"FINERY_VLLM_CA_FILE: got {file}"):
            Trust(file)


async def test_a_slow_reader_holds_the_server_back_and_gets_everything(server, client, monkeypatch):
    monkeypatch.setattr(upstream, "_MAX_WAITING_BYTES", 100_000)
    piece = b"x" * 50_000
    server.parts = [b"HTTP/1.1 200 OK\r\ncontent-length: 20000000\r\n\r\n", *[piece] * 400]
    answer = await client.post("/v1/x", headers={}, body=b"")
    await asyncio.sleep(0.2)
    size = longest = 0
    while data := await answer.read():
        size, longest = size + len(data), max(longest, len(data))
    answer.close()
    assert size == 20_000_000
    assert longest < 1_000_000


_GONE = """
import asyncio, subprocess, sys
from finery_gateway import upstream

async def main():
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    asked = asyncio.Event()

    async def serve(reader, writer):
        await reader.readuntil(b"\\r\\n\\r\\n")
        asked.set()
        await asyncio.sleep(60)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = upstream.Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s=30)
    waiting = asyncio.create_task(client.post("/", headers={}, body=b""))
    await asked.wait()
    # From here on no packet arrives, and nobody says so.
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    try:
        await waiting
    except upstream.UpstreamError as error:
        print(type(error).__name__)

for (level, option), value in upstream._DEAD_HOST.items():
    upstream._DEAD_HOST[level, option] = min(value, 1000 if value > 1000 else 1)
asyncio.run(main())
"""


def test_a_host_that_is_gone_without_a_word_is_noticed():
    program = ["unshare", "--net", sys.executable, "-c", _GONE]
    if subprocess.run(["unshare", "--net", "ip", "link"], capture_output=True, check=False).returncode:
        pytest.skip("no network of its own for the test here")
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "UpstreamError\n"), done.stderr
