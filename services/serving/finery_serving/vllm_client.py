"""Talking to vLLM and to our middleware in it, over its Unix socket.

Owns the calls and how their failures read in our tree. Leaves deciding what to call to `residency`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from finery_common.errors import FailedPreconditionError, FineryError, NotFoundError, UnavailableError
from finery_common.tracing import TRACEPARENT, traceparent
from finery_serving.vllm_endpoint import Endpoint

_TIMEOUT_S = 10.0
_LOAD_TIMEOUT_S = 120.0
_PROBE_TIMEOUT_S = 60.0
RETRY_AFTER_S = 5.0


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter as vLLM has it: the number of its engine and the folder it was read from."""

    id: int
    path: str


@dataclass(frozen=True)
class Requests:
    """The requests for a version since it was admitted, and the seconds since the latest."""

    count: int
    idle_s: float


@dataclass(frozen=True)
class ReplicaState:
    """What the middleware says: which versions may be asked, how many requests each has in flight and has had, which adapters are
    registered.
    """

    admitted: frozenset[str]
    in_flight: dict[str, int]
    adapters: dict[str, LoadedAdapter]
    requests: dict[str, Requests] = field(default_factory=dict)


class VllmClient:
    """A client of the vLLM at `endpoint`. Connection failures are UnavailableError: vLLM is starting or has died."""

    def __init__(self, endpoint: Endpoint, *, replica_token: str, admin_token: str) -> None:
        self._admin = {"x-finery-admin-token": admin_token}
        self._replica_token = replica_token
        self._http = endpoint.async_client(timeout_s=_TIMEOUT_S)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def is_healthy(self, *, timeout_s: float = _TIMEOUT_S) -> bool:
        """Whether vLLM answers its health check."""
        try:
            return (await self._http.get("/health", headers=self._admin, timeout=timeout_s)).status_code == 200
        except httpx.TransportError:
            return False

    async def state(self) -> ReplicaState:
        """The middleware's state."""
        answer = (await self._call("GET", "/finery/state")).json()
        adapters = {name: LoadedAdapter(**item) for name, item in answer["adapters"].items()}
        requests = {name: Requests(**item) for name, item in answer["requests"].items()}
        return ReplicaState(frozenset(answer["admitted"]), dict(answer["in_flight"]), adapters, requests)

    async def held(self) -> frozenset[int]:
        """The numbers of the adapters in the engine's caches. One that is not registered is what an unload has left behind."""
        return frozenset((await self._call("GET", "/finery/held")).json()["adapter_ids"])

    async def load(self, version: str, *, path: Path) -> None:
        """Registers the adapter in `path`. Raises FailedPreconditionError with vLLM's reason where it cannot be loaded."""
        body = {"lora_name": version, "lora_path": str(path)}
        try:
            await self._call("POST", "/v1/load_lora_adapter", json=body, timeout_s=_LOAD_TIMEOUT_S)
        except (FailedPreconditionError, NotFoundError) as error:
            message = error.message.replace(str(path), "its folder")
            raise FailedPreconditionError(f"vLLM could not load the adapter: {message}", code="adapter_not_loadable") from error

    async def unload(self, version: str, *, adapter_id: int | None) -> None:
        """Unregisters an adapter and frees its memory, where its number is known; one that is not registered is fine."""
        with contextlib.suppress(NotFoundError):
            await self._call("POST", "/v1/unload_lora_adapter", json={"lora_name": version})
        if adapter_id is not None:
            await self._call("POST", "/finery/remove", json={"adapter_id": adapter_id})

    async def admit(self, version: str) -> LoadedAdapter:
        """Lets requests for `version` in; answers what vLLM has under that name. Raises FailedPreconditionError where it has nothing."""
        return LoadedAdapter(**(await self._call("POST", "/finery/admit", json={"version": version})).json()["adapter"])

    async def retire(self, version: str) -> int:
        """Lets none in any more; answers how many are still in flight."""
        return int((await self._call("POST", "/finery/retire", json={"version": version})).json()["in_flight"])

    async def drain(self) -> None:
        """Lets none in any more, for no version: whoever comes is told to resolve the model again. Those in flight go on."""
        await self._call("POST", "/finery/drain")

    async def probe(self, version: str, *, alias: str) -> None:
        """One greedy token by the way that requests take. Raises FailedPreconditionError where it does not come, or under another name."""
        headers = {"x-finery-replica-token": self._replica_token, "x-finery-version": version, "x-finery-alias": alias}
        if trace := traceparent():
            headers[TRACEPARENT] = trace
        body = {"model": version, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        answer = (await self._call("POST", "/v1/completions", json=body, headers=headers, timeout_s=_PROBE_TIMEOUT_S)).json()
        if answer.get("model") != alias or answer.get("usage", {}).get("completion_tokens") != 1:
            raise FailedPreconditionError("The probe was answered, but not with one token under the alias.", code="probe_failed")

    async def _call(
        self, method: str, path: str, *, json: Any = None, headers: dict[str, str] | None = None, timeout_s: float = _TIMEOUT_S
    ) -> httpx.Response:
        try:
            response = await self._http.request(method, path, json=json, headers=headers or self._admin, timeout=timeout_s)
        except httpx.TransportError as error:
            raise UnavailableError(
                f"vLLM did not answer ({type(error).__name__}); it is started again by itself.", retry_after_s=RETRY_AFTER_S
            ) from error
        if response.status_code >= 400:
            raise _refusal(response)
        return response


def _refusal(response: httpx.Response) -> FineryError:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"status {response.status_code}"
    if response.status_code == 404:
        return NotFoundError(message)
    if response.status_code == 503:
        return UnavailableError(message, retry_after_s=RETRY_AFTER_S)
    return FailedPreconditionError(message, code="vllm_refused")
