"""Where vLLM listens: a Unix socket on one machine, a TLS port between hosts.

Owns vLLM's options for it, the address that routes carry, and the agent's own connections. Leaves the files to whoever makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import httpx

from finery_common.tls import VLLM_NAME, Trust


class Endpoint(Protocol):
    """One way to listen."""

    @property
    def address(self) -> str:
        """What the gateway connects to."""
        ...

    @property
    def options(self) -> list[str]:
        """vLLM's options."""
        ...

    def async_client(self, *, timeout_s: float) -> httpx.AsyncClient:
        """The agent's connections, without a token."""
        ...

    def client(self, *, timeout_s: float) -> httpx.Client:
        """The same for a thread."""
        ...


@dataclass(frozen=True)
class UnixEndpoint:
    """A socket in the replica's runtime folder."""

    socket: Path

    @property
    def address(self) -> str:
        return f"unix://{self.socket}"

    @property
    def options(self) -> list[str]:
        return ["--uds", str(self.socket)]

    def async_client(self, *, timeout_s: float) -> httpx.AsyncClient:
        """Over the socket."""
        return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(self.socket)), base_url="http://vllm", timeout=timeout_s)

    def client(self, *, timeout_s: float) -> httpx.Client:
        """Over the socket."""
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://vllm", timeout=timeout_s)


@dataclass(frozen=True)
class TlsEndpoint:
    """A port that other hosts reach. Addresses are `host:port`; vLLM reads the certificate again when its file is written over."""

    listen_address: str
    advertise_address: str
    cert_file: Path
    key_file: Path
    ca_file: Path

    @property
    def address(self) -> str:
        return f"https://{self.advertise_address}"

    @property
    def options(self) -> list[str]:
        host, _, port = self.listen_address.rpartition(":")
        files = ["--ssl-certfile", str(self.cert_file), "--ssl-keyfile", str(self.key_file), "--enable-ssl-refresh"]
        return ["--host", host.strip("[]"), "--port", port, *files]

    def async_client(self, *, timeout_s: float) -> httpx.AsyncClient:
        """To the advertised address: what the gateway could not reach is not healthy."""
        trust = Trust(self.ca_file)

        async def prepare(request: httpx.Request) -> None:
            _prepare(request, trust)

        hooks = {"request": [prepare]}
        return httpx.AsyncClient(verify=trust.context(), base_url=self.address, timeout=timeout_s, event_hooks=hooks, trust_env=False)

    def client(self, *, timeout_s: float) -> httpx.Client:
        """To the advertised address."""
        trust = Trust(self.ca_file)
        hooks = {"request": [partial(_prepare, trust=trust)]}
        return httpx.Client(verify=trust.context(), base_url=self.address, timeout=timeout_s, event_hooks=hooks, trust_env=False)


def _prepare(request: httpx.Request, trust: Trust) -> None:
    """Before a connection is made for it: the name to ask for, and authorities that are new."""
    request.extensions["sni_hostname"] = VLLM_NAME
    trust.context()
