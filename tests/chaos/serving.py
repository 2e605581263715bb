"""Serving as these tests see it: its deployments by the public gRPC port, its vLLM by the agent's own door."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
from e2e.system import System

from finery.common.v1 import job_pb2
from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery_common.artifacts import ArtifactRef

PROJECT = "projects/default"
CALL_S = 30.0
SETTLE_S = 240.0
"""Longer than a vLLM takes to start on two busy cores."""


class Deployments:
    """What the default project has deployed. Calls raise grpc.RpcError."""

    def __init__(self, system: System) -> None:
        self.channel = grpc.insecure_channel(system.running.grpc_address)
        self._stub = serving_pb2_grpc.ServingServiceStub(self.channel)
        self._call = {"metadata": (("authorization", f"Bearer {system.api_key}"),), "timeout": CALL_S}

    def deploy(self, alias: str, ref: ArtifactRef, *, request_id: str = "", canary_weight: int | None = None) -> serving_pb2.Alias:
        adapter = job_pb2.ArtifactRef(prefix=ref.prefix, manifest_sha256=ref.manifest_sha256, kind=ref.kind, size_bytes=ref.size_bytes)
        request = serving_pb2.DeployAdapterRequest(
            parent=PROJECT, alias=alias, adapter=adapter, request_id=request_id or secrets.token_hex(8), canary_weight=canary_weight
        )
        return self._stub.DeployAdapter(request, **self._call)

    def get(self, alias: str) -> serving_pb2.Alias:
        return self._stub.GetAlias(serving_pb2.GetAliasRequest(name=f"{PROJECT}/aliases/{alias}"), **self._call)

    def delete(self, alias: str) -> None:
        self._stub.DeleteAlias(serving_pb2.DeleteAliasRequest(name=f"{PROJECT}/aliases/{alias}"), **self._call)

    def promote(self, alias: str, *, etag: str) -> serving_pb2.Alias:
        name = f"{PROJECT}/aliases/{alias}"
        return self._stub.PromoteAlias(serving_pb2.PromoteAliasRequest(name=name, etag=etag, request_id=secrets.token_hex(8)), **self._call)

    def until(self, alias: str, *states: str) -> serving_pb2.Alias:
        """The alias once its rollout is in one of `states`; a service that is gone meanwhile is waited for."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            try:
                found = self.get(alias)
                state = serving_pb2.RolloutState.Name(found.rollout.state).removeprefix("ROLLOUT_STATE_")
                if state in states:
                    return found
                assert state != "FAILED", found.rollout.error
            except grpc.RpcError as error:
                state = error.code()
                if state not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
            assert time.monotonic() < deadline_s, f"{alias} is {state} after {SETTLE_S:.0f} s, wanted {states}"
            time.sleep(0.05)

    def served(self, alias: str, ref: ArtifactRef) -> serving_pb2.Alias:
        """Deploys, and waits until that is done."""
        self.deploy(alias, ref)
        return self.until(alias, "READY")


def vllm_pid(system: System) -> int | None:
    """Of the process that runs now, or None."""
    noted = _noted(system)
    return None if noted is None else noted["pid"]


def vllm_state(system: System) -> dict[str, dict[str, object]]:
    """Requests in flight by version, and adapters as vLLM has them registered. Raises httpx.TransportError while it is down."""
    return _asked(system, "state")


def held_adapters(system: System) -> list[int]:
    """The numbers of the adapters in the engine's caches, registered or not."""
    return _asked(system, "held")["adapter_ids"]


def _asked(system: System, path: str) -> dict[str, Any]:
    noted = _noted(system)
    if noted is None:
        raise httpx.ConnectError("no vLLM runs")
    runtime = Path(noted["runtime"])
    token = json.loads((runtime / "middleware.json").read_text())["admin_token"]
    transport = httpx.HTTPTransport(uds=str(runtime / "vllm.sock"))
    with httpx.Client(transport=transport, base_url="http://vllm", headers={"x-finery-admin-token": token}) as http:
        return http.get(f"/finery/{path}").raise_for_status().json()


def copies(system: System) -> set[str]:
    """Names of everything in the cache of adapters, hidden or not."""
    return {path.name for path in (system.layout.state_dir / "cache" / "serving").glob("*")}


def _noted(system: System) -> dict | None:
    try:
        return json.loads((system.layout.state_dir / "run" / "vllm.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
