"""The probe that health checks of containers run, as a process, against real servers."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading

import pytest

from finery_common.rpc.server import RpcServer


def probe(*urls: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "finery_common.probe", *urls], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


async def _nobody(token: str):
    raise AssertionError("a probe needs no token")


async def test_a_grpc_server_is_well_while_it_serves_and_not_while_it_drains():
    server = RpcServer(address="127.0.0.1:0", servicers=[], authenticate=_nobody)
    port = await server.start()
    assert await asyncio.to_thread(probe, f"grpc://127.0.0.1:{port}") == (0, "")
    await server.stop(drain_s=0)
    status, said = await asyncio.to_thread(probe, f"grpc://127.0.0.1:{port}")
    assert status == 1
    assert f"127.0.0.1:{port} does not answer" in said


@pytest.mark.parametrize(("answer", "status", "words"), [(200, 0, ""), (503, 1, "503")])
def test_an_http_server_is_well_when_it_answers_200(answer, status, words):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            code, said = probe(f"http://127.0.0.1:{server.server_port}/readyz")
        finally:
            server.shutdown()
            thread.join()
    assert code == status
    assert words in said


def test_each_of_several_that_is_not_well_is_named():
    status, said = probe("ftp://one", "ftp://other")
    assert status == 1
    assert [line.split("'")[1] for line in said.splitlines()] == ["ftp://one", "ftp://other"]


def test_nothing_to_ask_is_no_success():
    assert probe()[0] == 1


def test_what_it_cannot_ask_is_said_in_one_line():
    assert probe("ftp://there") == (1, "finery_common.probe: got 'ftp://there', wanted grpc://host:port or http://host:port/path\n")
