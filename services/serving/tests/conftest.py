"""An agent with a real store and database, and a stand-in for vLLM's process."""

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

from finery_common.database import Database
from finery_serving.agent import Agent
from finery_serving.preflight import BaseModel
from finery_serving.vllm_process import VllmConfig, make_runtime

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
    def publish(*extra: str, step: int = 1):
        weights = {f"base_model.model.model.q_proj.lora_{side}.weight": np.ones((4, 4), np.float32) for side in "AB"}
        with object_store.writer(f"projects/{project}/adapters/ftjob-{secrets.token_hex(4)}-{step}/", kind="adapter") as writer:
            writer.put_bytes("adapter_config.json", data=json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}).encode())
            writer.put_bytes("adapter_model.safetensors", data=save(weights))
            for name in extra:
                writer.put_bytes(name, data=b"")
            metadata = {"base_model": _BASE.name, "base_model_sha256": _BASE.sha256}
            return writer.publish(made_from={}, spec={}, attempt="1", metadata=metadata)

    return publish


@pytest.fixture
def running(tmp_path, agent_database, object_store):
    """Starts an agent, and at the end of the block stops it and its vLLM."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "fake_vllm.py"} "$@"\n')
    python.chmod(0o755)

    @asynccontextmanager
    async def running(*, max_cpu_loras=4, name=""):
        """`name` tells agents of one test apart."""
        config = VllmConfig(python, _BASE.name, tmp_path, "cpu", 2, max_cpu_loras, 8, 128, 1, 30, ())
        runtime = make_runtime(None, xdg_runtime_dir=None, secret="s" * 40)
        agent = Agent(config, runtime=runtime, state_dir=tmp_path / name, environment=os.environ)
        try:
            async with (
                agent.vllm_running() as supervising,
                agent.reconciling(agent_database, store=object_store, base=_BASE, cache_dir=tmp_path / name / "cache") as services,
            ):
                yield SimpleNamespace(
                    agent=agent,
                    store=services.aliases,
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
