"""The program that `helm test` runs, as the chart writes it, against real servers."""

from __future__ import annotations

import asyncio
import sys

import pytest
from chart_rendering import CASES, Manifests

from finery_common.rpc.server import RpcServer, token_authenticator
from finery_common.rpc.tokens import TokenSigner


async def ready(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A gateway that is ready."""
    writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 15\r\nconnection: close\r\n\r\n{"ready": true}')
    await writer.drain()
    writer.close()


@pytest.fixture
async def addresses():
    """Of a gateway and of an inner service; and the service."""
    gateway = await asyncio.start_server(ready, "127.0.0.1", 0)
    service = RpcServer(address="127.0.0.1:0", servicers=[], authenticate=token_authenticator(TokenSigner("s" * 40)))
    port = await service.start()
    yield f"127.0.0.1:{gateway.sockets[0].getsockname()[1]}", f"127.0.0.1:{port}", service
    await service.stop(drain_s=0)
    gateway.close()


async def run(manifests: Manifests, gateway: str, service: str) -> tuple[int | None, str]:
    """Its exit status and what it said, with the cluster's names made these addresses."""
    (container,) = manifests.one("Pod", "demo-finery-test")["spec"]["containers"]
    script, *services = container["args"]
    for name, address in (("demo-finery-gateway", gateway), ("demo-finery-{service}:9000", service)):
        assert name in script
        script = script.replace(name, address)
    command = [sys.executable, *container["command"][1:], script, *services]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_all_services_are_asked_and_good(addresses, render):
    status, said = await run(render(CASES["default"]), *addresses[:2])
    assert status == 0, said
    assert [line.split()[0] for line in said.splitlines()] == ["gateway", "dataprep", "trainer", "converter", "serving"]
    status, said = await run(render(CASES["no pools"]), *addresses[:2])
    assert "serving" not in said.split()


async def test_a_service_that_does_not_serve_is_named(addresses, render):
    await addresses[2].set_health("", is_serving=False)
    status, said = await run(render(CASES["default"]), *addresses[:2])
    assert status == 1
    assert said.splitlines()[-1].startswith("dataprep does not serve; see: kubectl -n ml logs")
