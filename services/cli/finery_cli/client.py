"""The command's connection to a gateway: its address, its key, the `openai` client and plain HTTP for the native API."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx
from openai import OpenAI

from finery_cli.local.layout import Layout, RunningStack
from finery_cli.output import clear_errors
from finery_common.errors import UnauthenticatedError

DEFAULT_URL = "http://127.0.0.1:8080"
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Gateway:
    """One gateway and the key to it."""

    url: str
    api_key: str

    @classmethod
    def connect(cls, state_dir: Path | None = None) -> Gateway:
        """FINERY_URL and FINERY_API_KEY, else the system that runs on this machine. Raises UnauthenticatedError without a key."""
        layout = Layout.of(state_dir)
        running = layout.running()
        url = os.environ.get("FINERY_URL") or (running.http_url if running else DEFAULT_URL)
        return cls(url.rstrip("/"), os.environ.get("FINERY_API_KEY") or _read_key(layout))

    @classmethod
    def of_system(cls, layout: Layout, running: RunningStack) -> Gateway:
        """The system that runs from `layout`, whatever the environment names. Raises UnauthenticatedError where its key is gone."""
        return cls(running.http_url, _read_key(layout))

    @cached_property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, timeout=_TIMEOUT_S)

    @cached_property
    def native(self) -> httpx.Client:
        """The native API, `/api/v1`."""
        headers = {"authorization": f"Bearer {self.api_key}"}
        return httpx.Client(
            base_url=f"{self.url}/api/v1", headers=headers, timeout=_TIMEOUT_S, event_hooks={"response": [_raise_for_status]}
        )

    def close(self) -> None:
        """Closes the connections that were opened."""
        for client in (vars(self).get("openai"), vars(self).get("native")):
            if client is not None:
                client.close()


@contextmanager
def connected(state_dir: Path | None = None) -> Iterator[Gateway]:
    """`Gateway.connect` for a command: what goes wrong with it, or in calls to it, ends the command with one clear line."""
    with clear_errors():
        gateway = Gateway.connect(state_dir)
    try:
        with clear_errors(gateway.url):
            yield gateway
    finally:
        gateway.close()


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_error:
        response.read()
        response.raise_for_status()


def _read_key(layout: Layout) -> str:
    try:
        key = layout.api_key_file.read_text().strip()
    except OSError:
        key = ""
    if not key:
        raise UnauthenticatedError(
            f"No API key: set FINERY_API_KEY, or start the system here by `finery up`, which writes {layout.api_key_file}."
        )
    return key
