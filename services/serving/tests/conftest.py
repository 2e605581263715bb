"""An agent with a real store and database, and a stand-in for vLLM's process; by itself, and behind real gRPC with a client."""

import asyncio
import json
import os
import secrets
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save

from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery_common.database import Database
from finery_common.rpc.channel import ServiceChannel, stream
from finery_common.rpc.messages import artifact_to_proto
from finery_common.rpc.server import RpcServer, token_authenticator
from finery_common.rpc.tokens import TokenSigner
from finery_serving.agent import Agent
from finery_serving.preflight import BaseModel
from finery_serving.server import ServingServicer, servicer_of
from finery_serving.vllm_process import VllmConfig, make_runtime

SIGNER = TokenSigner("s" * 40)
STEP_S = 30.0
_BASE = BaseModel("base", "b" * 64, {"model.q_proj.weight": (4, 4)})


@pytest.fixture
def base() -> BaseModel:
    return _BASE


@pytest.fixture
def project():
    return f"p{secrets.token_hex(6)}"


@pytest.fixture
async def agent_database(tmp_path):
    db = await Database.open(f"sqlite:///{tmp_path / 'serving.sqlite'}", schema="serving")
    await db.migrate("finery_serving.migrations", version_table="serving_version")
    yield db
    await db.close()


@pytest.fixture
def publish(object_store, project):
    def publish(*extra: str, step: int = 1, base: BaseModel = _BASE):
        weights = {f"base_model.model.model.q_proj.lora_{side}.weight": np.ones((4, 4), np.float32) for side in "AB"}
        with object_store.writer(f"projects/{project}/adapters/ftjob-{secrets.token_hex(4)}-{step}/", kind="adapter") as writer:
            writer.put_bytes("adapter_config.json", data=json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}).encode())
            writer.put_bytes("adapter_model.safetensors", data=save(weights))
            for name in extra:
                writer.put_bytes(name, data=b"")
            metadata = {"base_model": base.name, "base_model_sha256": base.sha256}
            return writer.publish(made_from={}, spec={}, attempt="1", metadata=metadata)

    return publish


@pytest.fixture
def running(tmp_path, agent_database, object_store):
    """Starts an agent, and at the end of the block stops it and its vLLM."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "fake_vllm.py"} "$@"\n')
    python.chmod(0o755)

    @asynccontextmanager
    async def running(*, max_cpu_loras=4, name="", base=_BASE, max_model_len=128):
        """`name` tells agents of one test apart."""
        config = VllmConfig(python, base.name, tmp_path, "cpu", 2, max_cpu_loras, 8, max_model_len, 1, 30, ())
        runtime = make_runtime(None, xdg_runtime_dir=None, secret="s" * 40)
        agent = Agent(config, runtime=runtime, state_dir=tmp_path / name, environment=os.environ)
        try:
            async with (
                agent.vllm_running() as supervising,
                agent.reconciling(agent_database, store=object_store, base=base, cache_dir=tmp_path / name / "cache") as services,
            ):
                yield SimpleNamespace(
                    agent=agent,
                    store=services.aliases,
                    deployments=services.deployments,
                    releases=services.releases,
                    routes=services.routes,
                    residency=services.residency,
                    registry=services.registry,
                    supervising=supervising,
                    tasks=services.tasks,
                )
        finally:
            runtime.remove()

    return running


class Client:
    """One project's, and the agent behind it."""

    def __init__(self, here, stub, *, project, metadata):
        self.here, self.stub, self.project, self.metadata = here, stub, project, metadata

    def name(self, alias):
        return f"projects/{self.project}/aliases/{alias}"

    async def deploy(self, ref, alias="m", *, weight=None):
        request = serving_pb2.DeployAdapterRequest(
            parent=f"projects/{self.project}",
            alias=alias,
            adapter=artifact_to_proto(ref),
            request_id=secrets.token_hex(8),
            canary_weight=weight,
        )
        return await self.stub.DeployAdapter(request, metadata=self.metadata)

    async def call(self, method, alias="m", **fields):
        request_type = getattr(serving_pb2, f"{method}Request")
        if method in ("PromoteAlias", "RollBackAlias"):
            fields = {"request_id": secrets.token_hex(8), **fields}
        return await getattr(self.stub, method)(request_type(name=self.name(alias), **fields), metadata=self.metadata)

    async def until(self, state, alias="m"):
        """The alias once its rollout is in `state`, by watching."""
        request = serving_pb2.WatchAliasesRequest(parent=f"projects/{self.project}")
        async for event in stream(self.stub.WatchAliases(request, metadata=self.metadata, timeout=STEP_S)):
            assert event.alias.rollout.state != serving_pb2.ROLLOUT_STATE_FAILED or state == "FAILED", event.alias.rollout.error
            if event.alias.alias == alias and event.alias.rollout.state == getattr(serving_pb2, f"ROLLOUT_STATE_{state}"):
                return event.alias
        raise AssertionError("a watch has no end")

    async def served(self, ref, alias="m"):
        await self.deploy(ref, alias)
        return await self.until("READY", alias)

    async def with_canary(self, ref, *, weight=10):
        await self.deploy(ref, weight=weight)
        return await self.until("CANARY")

    async def route(self, model="m", *, after_epoch=0, timeout_s=STEP_S):
        request = serving_pb2.ResolveModelRequest(parent=f"projects/{self.project}", model=model, after_epoch=after_epoch)
        return await self.stub.ResolveModel(request, metadata=self.metadata, timeout=timeout_s)

    async def split(self, alias="m"):
        return [(target.version, target.weight) for target in (await self.route(alias)).targets]

    async def loaded(self, *versions):
        """Waits until vLLM holds `versions` and nothing else."""
        async with asyncio.timeout(STEP_S):
            while set(self.here.residency.versions) != set(versions):
                await self.here.agent.changes.wait_after(self.here.agent.changes.count, timeout_s=0.1)


@pytest.fixture
def serving(running, project):
    """Starts an agent behind real gRPC."""

    @asynccontextmanager
    async def serving(**options):
        async with running(**options) as here:
            servicer = ServingServicer(
                here.store,
                deployments=here.deployments,
                releases=here.releases,
                routes=here.routes,
                registry=here.registry,
                residency=here.residency,
                changes=here.agent.changes,
            )
            server = RpcServer(address="127.0.0.1:0", servicers=[servicer_of(servicer)], authenticate=token_authenticator(SIGNER))
            channel = ServiceChannel(f"127.0.0.1:{await server.start()}", signer=SIGNER, caller="test")
            stub = serving_pb2_grpc.ServingServiceStub(channel.grpc)
            try:
                yield Client(here, stub, project=project, metadata=channel.metadata(project=project))
            finally:
                servicer.end_watches()
                await channel.close()
                await server.stop(drain_s=0)

    return serving
