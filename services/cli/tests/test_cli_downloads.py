"""`finery artifacts`, against a gateway and a store that break off, answer wrongly and go away."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from finery_cli import downloads
from finery_cli.__main__ import build_app

KEY = "sk-finery-test"
SIGNATURE = "X-Amz-Signature=5ec2e7"


class World:
    """A gateway with one artifact, `models/conv-1`, and the store that it lies in, on a port each."""

    def __init__(self) -> None:
        self.files = {"config.json": b"{}", "sub/empty": b"", "model.gguf": os.urandom(3 << 20)}
        self.said_sha256: dict[str, str] = {}
        self.breaks_after: list[int] = []
        """Of each coming answer of the store: the bytes after which it breaks off."""
        self.wrong_answers = 0
        self.statuses: list[int] = []
        self.ignores_range = False
        self.pause_s = 0.0
        self.requests: list[tuple[str, str, str]] = []
        """Where, what, and the range asked for."""
        self.store_headers: list[dict[str, str]] = []
        self.gateway, self.store = (self._serve(place) for place in ("gateway", "store"))
        self.store_url = f"http://127.0.0.1:{self.store.server_port}"

    def _serve(self, place: str) -> http.server.ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"world": self, "place": place})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def asked(self, place: str, name: str) -> list[str]:
        """The ranges asked for of a file."""
        return [ranged for where, what, ranged in self.requests if where == place and what.endswith(name) and what.startswith("GET")]


class _Handler(http.server.BaseHTTPRequestHandler):
    world: World
    place: str
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.world.requests.append((self.place, f"{self.command} {path}", self.headers.get("range", "")))
        if self.place == "store":
            self.world.store_headers.append(dict(self.headers))
            self._store(path)
        else:
            self._gateway(path.removeprefix("/api/v1/artifacts/"))

    do_POST = do_GET

    def _gateway(self, path: str) -> None:
        if self.headers["authorization"] != f"Bearer {KEY}":
            self._send(401, b"{}")
        elif path == "models":
            item = {"id": "conv-1", "size_bytes": 7, "num_files": 3, "create_time": "2026-01-01T00:00:00Z"}
            self._send(200, json.dumps({"data": [item], "next_page_token": ""}).encode())
        elif path == "models/conv-1/files":
            listed = [
                {"name": name, "size_bytes": len(data), "sha256": self.world.said_sha256.get(name) or hashlib.sha256(data).hexdigest()}
                for name, data in self.world.files.items()
            ]
            self._send(200, json.dumps(listed).encode())
        elif path.endswith("/download-url"):
            name = path.removeprefix("models/conv-1/files/").removesuffix("/download-url")
            url = f"{self.world.store_url}/bucket/{name}?{SIGNATURE}"
            self._send(200, json.dumps({"url": url, "expire_time": "2026-01-01T00:00:00Z"}).encode())
        elif path.startswith("models/conv-1/files/"):
            self._send_from(self.world.files[path.removeprefix("models/conv-1/files/")])
        else:
            self._send(404, b'{"error": {"message": "There is no artifact of that name."}}')

    def _store(self, path: str) -> None:
        if self.world.statuses:
            self._send(self.world.statuses.pop(0), b"<Error/>")
            return
        data = self.world.files[path.removeprefix("/bucket/")]
        if self.world.wrong_answers:
            self.world.wrong_answers -= 1
            data = b"x" * len(data)
        self._send_from(data)

    def _send_from(self, data: bytes) -> None:
        offset = 0 if self.world.ignores_range else int(self.headers.get("range", "bytes=0-")[6:-1])
        limit = self.world.breaks_after.pop(0) if self.world.breaks_after and self.place == "store" else len(data)
        self.send_response(206 if offset else 200)
        self.send_header("content-length", str(len(data) - offset))
        self.end_headers()
        for start in range(offset, min(len(data), offset + limit), 1 << 18):
            self.wfile.write(data[start : min(start + (1 << 18), offset + limit)])
            time.sleep(self.world.pause_s)
        if limit < len(data) - offset:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed is what a test wants."""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    monkeypatch.setenv("FINERY_URL", f"http://127.0.0.1:{made.gateway.server_port}")
    monkeypatch.setenv("FINERY_API_KEY", KEY)
    monkeypatch.setattr(downloads, "_FIRST_WAIT_S", 0.01)
    yield made
    for server in (made.gateway, made.store):
        server.shutdown()
        server.server_close()


def run(*arguments: str | Path, fails: bool = False):
    done = CliRunner().invoke(build_app(), ["artifacts", *map(str, arguments)])
    assert (done.exit_code != 0) == fails, done.output
    assert SIGNATURE not in done.output or arguments[0] == "url"
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_of_an_artifact_is_downloaded_from_the_store(world, tmp_path):
    done = run("download", "models/conv-1", "--output", tmp_path / "out", "--json")
    assert contents(tmp_path / "out") == world.files
    assert json.loads(done.stdout)["files"] == [str(tmp_path / "out" / name) for name in world.files]
    assert world.asked("gateway", "/files/model.gguf") == []
    assert not any("authorization" in {name.lower() for name in headers} for headers in world.store_headers)


def test_what_is_there_is_not_fetched_again(world, tmp_path):
    run("download", "models/conv-1", "--output", tmp_path)
    world.requests.clear()
    run("download", "models/conv-1", "--output", tmp_path)
    assert [what for _, what, _ in world.requests] == ["GET /api/v1/artifacts/models/conv-1/files"]


def test_a_file_with_other_content_is_not_written_over(world, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    done = run("download", "models/conv-1", "--output", tmp_path, fails=True)
    assert "other content" in done.output
    assert contents(tmp_path) == {"config.json": b"mine"}


def test_a_connection_that_breaks_is_gone_on_from(world, tmp_path):
    world.breaks_after = [1 << 30, 1_000_000, 1_000_000]
    run("download", "models/conv-1", "--output", tmp_path)
    assert contents(tmp_path) == world.files
    ranges = world.asked("store", "model.gguf")
    assert ranges[0] == ""
    assert len(ranges) == 3
    assert all(int(ranged[6:-1]) > 0 for ranged in ranges[1:])


def test_one_that_keeps_breaking_ends_and_the_next_call_goes_on(world, tmp_path):
    world.statuses = [503, 403] * 3
    done = run("download", "models/conv-1", "--output", tmp_path, "--file", "model.gguf", fails=True)
    assert "broke off at byte 0 (the object store answered HTTP 403); the same command goes on" in done.output.replace("\n", " ")
    # Each brings something, so that it is gone on from more often than a connection may fail in vain.
    world.breaks_after = [300_000] * 8
    run("download", "models/conv-1", "--output", tmp_path)
    assert contents(tmp_path) == world.files


def test_a_process_that_is_killed_leaves_no_file_under_its_name_and_is_gone_on_from(world, tmp_path):
    world.pause_s = 0.1
    command = [sys.executable, "-m", "finery_cli", "artifacts", "download", "models/conv-1", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 20
    while not any(path.stat().st_size for path in tmp_path.glob(".model.gguf.*.partial")):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    other = run("download", "models/conv-1", "--output", tmp_path, fails=True)
    assert "another process" in other.output
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "model.gguf").exists()
    (partial,) = tmp_path.glob(".model.gguf.*.partial")
    left_bytes = partial.stat().st_size
    world.pause_s = 0
    world.requests.clear()
    run("download", "models/conv-1", "--output", tmp_path)
    assert contents(tmp_path) == world.files
    assert world.asked("store", "model.gguf") == [f"bytes={left_bytes}-"]


def test_wrong_bytes_are_fetched_once_more_and_then_refused(world, tmp_path):
    world.wrong_answers = 1
    run("download", "models/conv-1", "--output", tmp_path / "a")
    assert contents(tmp_path / "a") == world.files
    world.said_sha256["model.gguf"] = "0" * 64
    done = run("download", "models/conv-1", "--output", tmp_path / "b", fails=True)
    assert "another SHA-256" in done.output
    assert set(contents(tmp_path / "b")) == {"config.json", "sub/empty"}


def test_what_an_earlier_call_left_wrong_is_thrown_away(world, tmp_path):
    digest = hashlib.sha256(world.files["model.gguf"]).hexdigest()
    (tmp_path / f".model.gguf.{digest[:16]}.partial").write_bytes(b"x" * 1000)
    run("download", "models/conv-1", "--output", tmp_path)
    assert contents(tmp_path) == world.files


def test_a_store_that_ignores_ranges_sends_all_of_it_again(world, tmp_path):
    world.ignores_range = True
    world.breaks_after = [1 << 30, 1_000_000]
    run("download", "models/conv-1", "--output", tmp_path)
    assert contents(tmp_path) == world.files


def test_a_store_out_of_reach_is_gone_round_through_the_gateway(world, tmp_path):
    world.store_url = "http://127.0.0.1:9"
    done = run("download", "models/conv-1", "--output", tmp_path)
    assert contents(tmp_path) == world.files
    assert done.output.count("going through the gateway") == 1
    assert world.asked("gateway", "/files/model.gguf") == [""]


def test_a_disk_that_is_too_small_is_said_before_anything_is_copied(world, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: downloads.shutil._ntuple_diskusage(100, 90, 10))
    done = run("download", "models/conv-1", "--output", tmp_path, fails=True)
    assert f"needs {(3 << 20) + 2 + (16 << 20):,} bytes and 10 are free" in done.output.replace("\n", " ")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_no_file_is_put_outside_of_the_folder(world, tmp_path, name):
    world.files = {name: b"x"}
    done = run("download", "models/conv-1", "--output", tmp_path / "out", fails=True)
    assert "outside of" in done.output
    assert contents(tmp_path) == {}


def test_only_the_files_named_are_downloaded(world, tmp_path):
    run("download", "models/conv-1", "--output", tmp_path, "--file", "config.json", "--file", "sub/empty")
    assert contents(tmp_path) == {"config.json": b"{}", "sub/empty": b""}
    assert "there are config.json" in run("download", "models/conv-1", "--output", tmp_path, "--file", "other", fails=True).output


def test_artifacts_files_and_urls_are_shown(world):
    assert json.loads(run("list", "models", "--json").stdout)[0]["artifact"] == "models/conv-1"
    assert [row["name"] for row in json.loads(run("files", "models/conv-1", "--json").stdout)] == list(world.files)
    made = run("url", "models/conv-1", "sub/empty", "--lifetime", "12h")
    assert made.stdout.splitlines()[0] == f"{world.store_url}/bucket/sub/empty?{SIGNATURE}"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("download", "conv-1", "--output", "x"), "models/conv-"),
        (("download", "models/../x", "--output", "x"), "models/conv-"),
        (("files", "models/other"), "There is no artifact"),
        (("list", "secrets"), "wanted one of"),
        (("url", "models/conv-1", "x", "--lifetime", "soon"), "such as 12h"),
    ],
)
def test_what_cannot_be_says_so(world, arguments, text):
    assert text in run(*arguments, fails=True).output
