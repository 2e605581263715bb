"""The object store gone while an adapter is staged. Reads and writes of a store that comes and goes: `test_seaweedfs`, `test_faults`."""

from __future__ import annotations

import time

import psutil
import pytest
from chaos.adapters import Adapters
from chaos.load import say
from chaos.serving import Deployments, copies
from e2e.system import System
from openai import OpenAI

pytestmark = pytest.mark.timeout(900)


def test_a_store_that_is_killed_while_an_adapter_is_staged_costs_time_only(
    system: System, client: OpenAI, deployments: Deployments, adapters: Adapters, is_long: bool
):
    old = deployments.served("staged", adapters.publish(0)).version
    before, ref = say(client, "staged"), adapters.publish(1)
    store = psutil.Process(system.running.processes["object store"])
    store.suspend()
    deployments.deploy("staged", ref)
    assert deployments.until("staged", "STAGING").version == old
    # Past a request's own deadline the rollout itself begins again.
    time.sleep(75 if is_long else 1)
    assert say(client, "staged") == before
    store.kill()
    assert deployments.until("staged", "READY").version != old
    assert say(client, "staged") != before
    assert ref.manifest_sha256 in copies(system)
    assert not [name for name in copies(system) if name.startswith(".")]
    deployments.delete("staged")
