"""`python -m finery_serving`: reads the environment, starts vLLM first since it takes longest, then everything else, and serves."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import structlog
from prometheus_client import REGISTRY

from finery_common.artifacts import ArtifactStore
from finery_common.catalogue import BaseModelEntry, Catalogue, folder_sha256, materialize
from finery_common.database import Database
from finery_common.errors import FailedPreconditionError
from finery_common.gpu_metrics import serve_gpu_metrics
from finery_common.rpc.server import RpcServer, token_authenticator
from finery_common.rpc.tokens import TokenSigner
from finery_common.service import run_service, until_stopped
from finery_common.telemetry import serve_metrics
from finery_serving.agent import Agent
from finery_serving.certificates import keep_copied
from finery_serving.metrics import ReplicaCollector
from finery_serving.preflight import BaseModel, base_shapes
from finery_serving.server import ServingServicer, servicer_of
from finery_serving.settings import ServingSettings
from finery_serving.tool_calls import tool_call_parser
from finery_serving.vllm_process import VllmConfig, lora_slots, make_runtime, vllm_version

# With the time that vLLM has for its end, below the 30 s after which supervisors kill.
_DRAIN_S = 8.0

_DEFAULT_LORA_RANK = {"cuda": 64, "cpu": 16}
log = structlog.get_logger(__name__)


def main() -> int:
    """The process's exit status."""
    return run_service("serving", ServingSettings, _serve)


async def _serve(settings: ServingSettings) -> None:
    signer = TokenSigner(settings.token_secret())
    serve_metrics(host=settings.metrics_host, port=settings.metrics_port)
    serve_gpu_metrics()
    store = await asyncio.to_thread(ArtifactStore.connect, settings.s3())
    entry = base_entry(settings)
    base_dir = await asyncio.to_thread(materialize, entry, cache_dir=settings.artifact_cache_dir, store=store)
    tls = settings.tls()
    xdg_runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    runtime = make_runtime(settings.runtime_dir, xdg_runtime_dir=xdg_runtime_dir, secret=settings.token_secret(), tls=tls)
    async with AsyncExitStack() as stack:
        stack.callback(runtime.remove)
        copying = [asyncio.create_task(keep_copied(tls, copies=runtime.tls), name="certificates")] if tls and runtime.tls else []
        for task in copying:
            stack.callback(task.cancel)
        agent = Agent(
            vllm_config(settings, entry=entry, base_dir=base_dir),
            runtime=runtime,
            state_dir=settings.replica_dir,
            environment=os.environ,
        )
        supervising = await stack.enter_async_context(agent.vllm_running())
        database = await Database.open(settings.service_database_url("serving"), schema="serving")
        stack.push_async_callback(database.close)
        await database.migrate("finery_serving.migrations", version_table="serving_version")
        base = await asyncio.to_thread(_describe, entry.name, base_dir, settings.artifact_cache_dir / "digests")
        services = await stack.enter_async_context(
            agent.reconciling(database, store=store, base=base, cache_dir=settings.adapter_cache_dir)
        )
        REGISTRY.register(ReplicaCollector(runtime.endpoint, replica=runtime.replica_id, admin_token=runtime.admin_token))
        servicer = ServingServicer(
            services.aliases,
            deployments=services.deployments,
            releases=services.releases,
            routes=services.routes,
            registry=services.registry,
            residency=services.residency,
            changes=agent.changes,
        )
        server = RpcServer(address=settings.grpc_address, servicers=[servicer_of(servicer)], authenticate=token_authenticator(signer))
        await server.start()
        telling = asyncio.create_task(tell_readiness(server, agent), name="readiness")
        stack.callback(telling.cancel)
        try:
            await until_stopped([supervising, telling, *copying, *services.tasks])
            await agent.drain(services.registry, timeout_s=settings.drain_s)
        finally:
            # Watches never end by themselves and would take up the whole time for draining.
            servicer.end_watches()
            await server.stop(drain_s=_DRAIN_S)


async def tell_readiness(server: RpcServer, agent: Agent) -> None:
    """Tells whoever asks for the health of `vllm`, as Kubernetes does before it goes on with the next replica, whether vLLM answers."""
    while True:
        seen = agent.changes.count
        await server.set_health("vllm", is_serving=agent.process.ready)
        await agent.changes.wait_after(seen)


def base_entry(settings: ServingSettings) -> BaseModelEntry:
    """The base model to serve. Raises FailedPreconditionError where the catalogue has several and none is chosen."""
    if settings.catalogue is None:
        raise FailedPreconditionError("FINERY_CATALOGUE is not set; set it to the YAML file of base models.")
    catalogue = Catalogue.load(settings.catalogue)
    if settings.serving_base_model:
        return catalogue.get(settings.serving_base_model)
    entries = catalogue.list()
    if len(entries) != 1:
        names = ", ".join(entry.name for entry in entries) or "none"
        raise FailedPreconditionError(
            f"FINERY_SERVING_BASE_MODEL is not set and the catalogue has {len(entries)} models ({names}); name the one to serve."
        )
    return entries[0]


def vllm_config(settings: ServingSettings, *, entry: BaseModelEntry, base_dir: Path) -> VllmConfig:
    """How vLLM is to run by these settings. Raises FailedPreconditionError where there is no vLLM."""
    if settings.vllm_python is None or not settings.vllm_python.exists():
        raise FailedPreconditionError(
            f"FINERY_VLLM_PYTHON: got {settings.vllm_python or 'nothing'}, wanted the Python of an environment with vLLM"
        )
    if settings.vllm_nodes > 1 and not settings.vllm_master_address:
        raise FailedPreconditionError(
            f"FINERY_VLLM_MASTER_ADDRESS is not set, but FINERY_VLLM_NODES is {settings.vllm_nodes}; set it to the first machine's name"
        )
    device = settings.serving_device
    if device == "auto":
        device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    max_cpu_loras = max(settings.max_loras, settings.max_cpu_loras)
    version = vllm_version(settings.vllm_python)
    max_loras = lora_slots(settings.max_loras, max_cpu_loras, version=version)
    if max_loras != settings.max_loras:
        log.warning("this vLLM needs a place on the GPU for each adapter", version=version, max_loras=max_loras)
    return VllmConfig(
        python=settings.vllm_python,
        base_model=entry.name,
        base_model_dir=base_dir,
        device=device,
        max_loras=max_loras,
        max_cpu_loras=max_cpu_loras,
        max_lora_rank=settings.max_lora_rank or _DEFAULT_LORA_RANK[device],
        max_model_len=settings.max_model_len or entry.max_sequence_length,
        tool_call_parser=tool_call_parser(settings.tool_call_parser, base_model_dir=base_dir),
        tensor_parallel_size=settings.tensor_parallel_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        nodes=settings.vllm_nodes,
        master_address=settings.vllm_master_address,
        kv_cache_gib=settings.vllm_kv_cache_gib,
        start_timeout_s=settings.vllm_start_timeout_s,
        private_paths=(str(settings.state_dir), str(settings.artifact_cache_dir)),
        hang_timeout_s=settings.vllm_hang_timeout_s,
        otlp_endpoint=settings.otlp_endpoint,
    )


def _describe(name: str, folder: Path, memo_dir: Path) -> BaseModel:
    return BaseModel(name, folder_sha256(folder, memo_dir=memo_dir), base_shapes(folder))


if __name__ == "__main__":
    sys.exit(main())
