"""kill -9 under load: of vLLM, of the agent (and its vLLM with it), of the gateway. The database's is in `test_own_machine`.

What ends with what, without load: `test_serving_process` (vLLM with its agent), `test_gateway_process` (workers), `test_faults` (a training
worker, another service), `test_seaweedfs` (the store).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import httpx
import pytest
from chaos.adapters import Adapters
from chaos.load import Load, say
from chaos.serving import SETTLE_S, Deployments, vllm_pid, vllm_state
from e2e.system import System
from openai import OpenAI

pytestmark = pytest.mark.timeout(900)

ALIASES = ("killed-1", "killed-2")


@pytest.mark.parametrize(
    ("pid_of", "expected"),
    [
        (vllm_pid, {"answered", "stream_broken", "503"}),
        (lambda system: system.running.processes["serving"], {"answered", "stream_broken", "503"}),
        (lambda system: system.running.processes["gateway"], {"answered", "cut off", "unreachable"}),
    ],
    ids=["vllm", "agent", "gateway"],
)
def test_a_killed_process_comes_back_with_everything_and_no_request_is_answered_wrong(
    system: System,
    client: OpenAI,
    adapters: Adapters,
    deployments: Deployments,
    pid_of: Callable[[System], int | None],
    expected: set[str],
):
    versions = {alias: deployments.served(alias, adapters.publish(seed)).version for seed, alias in enumerate(ALIASES)}
    before = {alias: say(client, alias) for alias in ALIASES}
    assert len(set(before.values())) == len(ALIASES)
    with Load(system, ALIASES) as load:
        load.wait_answers(timeout_s=60)
        killed = pid_of(system)
        assert killed
        # Whoever waits for a first byte is waited for and answered: only an answer that has begun is certain to be cut.
        load.wait_begun(timeout_s=60)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: pid_of(system) not in (None, killed), what="the next process")
        load.wait_answers(timeout_s=SETTLE_S)
    assert set(load.outcomes) <= expected, load.outcomes
    assert len(load.outcomes) > 1, f"nobody noticed: {load.outcomes}"
    assert {alias: say(client, alias) for alias in ALIASES} == before
    wait_until(lambda: set(versions.values()) <= set(vllm_state(system)["adapters"]), what="every version, asked for or not,")
    # What nobody waits for any more is not generated.
    wait_until(lambda: not vllm_state(system)["in_flight"], what="the end of abandoned requests")
    for alias in ALIASES:
        deployments.delete(alias)


def wait_until(holds: Callable[[], bool], *, what: str) -> None:
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        try:
            if holds():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline_s, f"{what} did not come within {SETTLE_S:.0f} s"
        time.sleep(0.1)
