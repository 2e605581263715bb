"""The program that `helm test` runs, as the chart writes it, against real servers."""

from __future__ import annotations

import asyncio
import re
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
    urls = [url.replace("demo-finery-gateway", gateway) for url in container["args"]]
    urls = [re.sub(r"demo-finery-[a-z]+:9000", service, url) for url in urls]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *container["command"][1:], *urls, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


@pytest.mark.parametrize(
    ("case", "services"),
    [("default", ["dataprep", "trainer", "converter", "serving"]), ("no pools", ["dataprep", "trainer", "converter"])],
)
async def test_all_services_are_asked_and_good(case, services, addresses, render):
    manifests: Manifests = render(CASES[case])
    (container,) = manifests.one("Pod", "demo-finery-test")["spec"]["containers"]
    assert container["args"] == ["http://demo-finery-gateway/readyz", *(f"grpc://demo-finery-{name}:9000" for name in services)]
    assert await run(manifests, *addresses[:2]) == (0, "")


async def test_a_service_that_does_not_serve_is_named(addresses, render):
    await addresses[2].set_health("", is_serving=False)
    status, said = await run(render(CASES["default"]), *addresses[:2])
    assert status == 1
    assert f"{addresses[1]} is NOT_SERVING" in said
