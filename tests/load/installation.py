"""A running gateway and serving service, seen by a test that deploys adapters and watches what it costs.

Owns publishing and deploying, and the reading of processes, files and registrations. Starting one is `stack`'s business, or that of the
end-to-end tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from finery_common.artifacts import ArtifactStore
from finery_common.errors import UnavailableError
from finery_common.rpc.channel import ServiceChannel
from finery_common.rpc.tokens import TokenSigner
from finery_gateway.client import ServingClient
from finery_gateway.resources import Alias, Artifact
from finery_serving.vllm_client import VllmClient
from finery_serving.vllm_endpoint import UnixEndpoint

_WATCH_AGAIN_S = 0.2


@dataclass(frozen=True)
class Place:
    """Where an installation is and what its clients need; `base_sha256` is the served folder's digest."""

    http_url: str
    api_key: str
    serving_address: str
    serving_pid: int
    serving_cache: Path
    signer: TokenSigner
    store: ArtifactStore
    project: str
    base_model: str
    base_sha256: str


@dataclass(frozen=True)
class Footprint:
    """What the serving service and its vLLM hold at one moment."""

    vllm_rss_bytes: int
    agent_rss_bytes: int
    num_fds: int
    num_staged: int
    num_registered: int
    num_held: int
    """Adapters in the engine's caches, registered or not."""


class Installation:
    """Deploys adapters; `watching` first."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._channel = ServiceChannel(place.serving_address, signer=place.signer, caller="load")
        self.serving = ServingClient(self._channel)
        self.replica = _replica_client(place.serving_pid)
        self._aliases: dict[str, Alias] = {}
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Follows the project's aliases while the block runs, and closes everything at its end."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._channel.close()
            await self.replica.close()

    def straight(self, version: str) -> tuple[str, dict[str, str]]:
        """vLLM's socket, and the headers of a request for `version` that goes there past the gateway."""
        folder, tokens = _runtime(self.place.serving_pid)
        headers = {"x-finery-replica-token": tokens["replica_token"], "x-finery-version": version, "x-finery-alias": version}
        return str(folder / "vllm.sock"), headers

    def publish(self, folder: Path) -> Artifact:
        """A new artifact with the adapter in `folder`."""
        place, job_id = self.place, f"ftjob-{secrets.token_hex(12)}"
        with place.store.writer(f"projects/{place.project}/adapters/{job_id}-1/", kind="adapter") as writer:
            for file in sorted(folder.iterdir()):
                writer.put_bytes(file.name, data=file.read_bytes())
            metadata = {"base_model": place.base_model, "base_model_sha256": place.base_sha256, "job_id": job_id, "step": 1}
            ref = writer.publish(made_from={"base_model": place.base_sha256}, spec={}, attempt="1", metadata=metadata)
        return Artifact(**ref.model_dump())

    async def deploy(self, alias: str, adapter: Artifact) -> Alias:
        """The alias once it has flipped to `adapter`."""
        made = await self.serving.deploy(self.place.project, alias=alias, adapter=adapter, etag="", request_id=secrets.token_hex(12))
        return await self.until(alias, lambda seen: seen.version == made.rollout.version and seen.epoch > made.epoch)

    async def until(self, alias: str, holds: Callable[[Alias], bool]) -> Alias:
        """The alias once `holds` of it. A rollout that fails is an error."""
        async with self._changed:
            while True:
                seen = self._aliases.get(alias)
                if seen is not None and holds(seen):
                    return seen
                assert seen is None or seen.rollout.state != "failed", seen
                await self._changed.wait()

    async def drained(self, alias: str) -> Alias:
        """The alias once nothing older than what serves is in vLLM."""
        return await self.until(alias, lambda seen: seen.rollout.state == "ready")

    async def footprint(self) -> Footprint:
        registered = len((await self.replica.state()).adapters)
        agent = psutil.Process(self.place.serving_pid)
        children = agent.children(recursive=True)
        staged = [path for path in self.place.serving_cache.glob("*") if not path.name.startswith(".")]
        return Footprint(
            vllm_rss_bytes=sum(child.memory_info().rss for child in children),
            agent_rss_bytes=agent.memory_info().rss,
            num_fds=sum(process.num_fds() for process in (agent, *children)),
            num_staged=len(staged),
            num_registered=registered,
            num_held=len(await self.replica.held()),
        )

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(UnavailableError):
                async for event in self.serving.watch_aliases(self.place.project):
                    async with self._changed:
                        self._aliases[event.alias.alias] = event.alias
                        self._changed.notify_all()
            await asyncio.sleep(_WATCH_AGAIN_S)


def _replica_client(serving_pid: int) -> VllmClient:
    """A client with the tokens of the vLLM below the serving service."""
    folder, tokens = _runtime(serving_pid)
    return VllmClient(UnixEndpoint(folder / "vllm.sock"), replica_token=tokens["replica_token"], admin_token=tokens["admin_token"])


def _runtime(serving_pid: int) -> tuple[Path, dict[str, str]]:
    """The folder of that vLLM's socket, and its tokens."""
    for child in psutil.Process(serving_pid).children(recursive=True):
        if config := child.environ().get("FINERY_MIDDLEWARE_CONFIG"):
            return Path(config).parent, json.loads(Path(config).read_text())
    raise AssertionError("no vLLM runs below the serving service")
