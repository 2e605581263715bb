"""The agent of one replica: vLLM and everything that manages it, wired together.

Owns the life of their tasks. Leaves the environment to `__main__` and gRPC to `server`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from finery_common.artifacts import ArtifactStore
from finery_common.database import Database
from finery_common.errors import FineryError
from finery_serving.aliases import AliasStore
from finery_serving.changes import Changes
from finery_serving.deployments import Deployments
from finery_serving.placement import Placement
from finery_serving.preflight import BaseModel
from finery_serving.reconcile import Reconciler
from finery_serving.registry import Registry
from finery_serving.releases import Releases
from finery_serving.residency import Residency
from finery_serving.rollout import RolloutRunner
from finery_serving.routes import Routes
from finery_serving.staging import Staging
from finery_serving.vllm_client import VllmClient
from finery_serving.vllm_process import Runtime, VllmConfig, VllmProcess

_HEARD_S = 0.5
"""By then the other agents have heard of a change, and tell gateways that ask."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Services:
    """What the gRPC face calls, and the tasks behind it, which never end by themselves."""

    aliases: AliasStore
    deployments: Deployments
    releases: Releases
    routes: Routes
    residency: Residency
    registry: Registry
    tasks: tuple[asyncio.Task[None], ...]


class Agent:
    """One vLLM under supervision; `vllm_running` first, `reconciling` inside it."""

    def __init__(self, config: VllmConfig, *, runtime: Runtime, state_dir: Path, environment: Mapping[str, str]) -> None:
        self.changes = Changes()
        self.client = VllmClient(runtime.endpoint, replica_token=runtime.replica_token, admin_token=runtime.admin_token)
        self.process = VllmProcess(config, runtime=runtime, state_dir=state_dir, environment=environment, client=self.client)
        self.process.on_change = self.changes.notify

    @asynccontextmanager
    async def vllm_running(self) -> AsyncIterator[asyncio.Task[None]]:
        """Starts vLLM and keeps it running, by a task that never ends by itself; it is stopped at the end."""
        try:
            async with _background(self.process.run(), name="vllm") as task:
                yield task
        finally:
            await self.client.close()

    async def drain(self, registry: Registry, *, timeout_s: float) -> None:
        """Takes this replica out of every route and waits until its requests are answered, or for `timeout_s` seconds.

        Gateways remember routes for longer: once `registry` has told all agents, vLLM refuses whoever still comes, who then asks for a
        route that leads elsewhere.
        """
        if not self.process.ready:
            return
        self.process.retire()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                refuses = False
                while True:
                    # The other agents have to hear of it first.
                    await asyncio.sleep(_HEARD_S)
                    refuses = refuses or (not registry.is_told_ready and await self._refuses())
                    if not await self._is_busy():
                        return
        log.warning("ending with requests in flight", waited_s=timeout_s)

    async def _refuses(self) -> bool:
        """Has vLLM let no more requests in, and answers whether it does. Where it does not, those that come are still answered."""
        try:
            await self.client.drain()
        except FineryError as error:
            log.warning("vLLM could not be told to refuse requests", reason=error.message)
            return False
        except Exception:
            log.exception("vLLM could not be told to refuse requests, as nobody expected")
            return False
        return True

    async def _is_busy(self) -> bool:
        try:
            return any((await self.client.state()).in_flight.values())
        except FineryError:
            return False
        except Exception:
            # Maybe there are; the time for them ends in any case.
            log.exception("vLLM did not say as expected whether requests are in flight")
            return True

    @asynccontextmanager
    async def reconciling(self, database: Database, *, store: ArtifactStore, base: BaseModel, cache_dir: Path) -> AsyncIterator[Services]:
        """Brings vLLM to what `database` wants for as long as the block runs."""
        config, changes = self.process.config, self.changes
        aliases = AliasStore(database, changes=changes)
        staging = Staging(store, folder=cache_dir)
        residency = Residency(self.process, client=self.client, max_resident=config.max_cpu_loras, changes=changes)
        registry = Registry(database, base=base, process=self.process, residency=residency, client=self.client, changes=changes)
        placement = Placement(registry=registry)
        runner = RolloutRunner(
            aliases,
            staging=staging,
            residency=residency,
            registry=registry,
            placement=placement,
            client=self.client,
            base=base,
            max_lora_rank=config.max_lora_rank,
            changes=changes,
        )
        reconciler = Reconciler(
            aliases, runner=runner, residency=residency, registry=registry, placement=placement, staging=staging, changes=changes
        )
        deployments = Deployments(aliases, registry=registry, staging=staging)
        routes = Routes(aliases, residency=residency, registry=registry, staging=staging, client=self.client, changes=changes)
        async with _background(registry.run(), name="registry") as telling, _background(reconciler.run(), name="reconciler") as reconciling:
            yield Services(aliases, deployments, Releases(database, changes=changes), routes, residency, registry, (telling, reconciling))


@asynccontextmanager
async def _background(work: Coroutine[None, None, None], *, name: str) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
