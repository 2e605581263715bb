"""Deployments that meet: two promotions at once, an alias that goes while it answers, and many cycles, which must leave nothing.

Promotions by their transactions: `test_serving_releases`; swaps in the middle of a stream: `test_serving_vllm`, `test_openai_path`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import psutil
import pytest
from chaos.adapters import Adapters
from chaos.load import outcome, say
from chaos.serving import Deployments, copies, held_adapters, vllm_pid, vllm_state
from e2e.system import System
from openai import OpenAI

pytestmark = pytest.mark.timeout(3600)

QUIET_S = 60.0


def test_of_two_promotions_at_once_one_wins_and_the_other_is_aborted(deployments: Deployments, adapters: Adapters):
    before = deployments.served("promoted", adapters.publish(0))
    deployments.deploy("promoted", adapters.publish(1), canary_weight=50)
    canary = deployments.until("promoted", "CANARY")

    def promote() -> str:
        try:
            return deployments.promote("promoted", etag=canary.etag).version
        except grpc.RpcError as error:
            return error.code().name

    with ThreadPoolExecutor(2) as pool:
        results = sorted(future.result() for future in [pool.submit(promote) for _ in range(2)])
    assert results == sorted(["ABORTED", canary.canary.version])
    after = deployments.until("promoted", "READY")
    assert (after.version, after.epoch) == (canary.canary.version, canary.epoch + 1)
    assert after.version != before.version
    deployments.delete("promoted")


def test_streams_end_whole_when_their_alias_is_taken_out(system: System, client: OpenAI, deployments: Deployments, adapters: Adapters):
    ref = adapters.publish(0)
    version = deployments.served("undeployed", ref).version
    num_tokens = 60

    def stream() -> list[str]:
        chunks = client.chat.completions.create(
            model="undeployed",
            messages=[{"role": "user", "content": "Count."}],
            max_tokens=num_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"min_tokens": num_tokens},
        )
        seen = list(chunks)
        assert seen[-1].usage is not None
        assert seen[-1].usage.completion_tokens == num_tokens
        return [chunk.model for chunk in seen]

    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(stream) for _ in range(3)]
        eventually(lambda: vllm_state(system)["in_flight"].get(version) == 3)
        deployments.delete("undeployed")
        # The gateway hears of it a moment later.
        eventually(lambda: outcome(client, "undeployed", streams=False) == "404")
        assert {model for future in streams for model in future.result()} == {"undeployed"}
    eventually(lambda: version not in vllm_state(system)["adapters"])
    eventually(lambda: ref.manifest_sha256 not in copies(system))


@dataclass(frozen=True)
class Footprint:
    """What the processes of one system hold, by process where it is theirs."""

    registered: frozenset[str]
    copies: frozenset[str]
    num_files: Mapping[str, int]
    memory_mib: Mapping[str, float]


def footprint(system: System) -> Footprint:
    trees = {name: [psutil.Process(system.running.processes[name])] for name in ("serving", "gateway")}
    vllm = psutil.Process(vllm_pid(system))
    trees["vllm"] = [vllm, *vllm.children(recursive=True)]
    return Footprint(
        registered=frozenset(vllm_state(system)["adapters"]),
        copies=frozenset(copies(system)),
        num_files={name: sum(process.num_fds() for process in tree) for name, tree in trees.items()},
        memory_mib={name: sum(process.memory_info().rss for process in tree) / 2**20 for name, tree in trees.items()},
    )


def test_cycles_of_deploying_and_undeploying_leave_nothing(
    system: System, client: OpenAI, deployments: Deployments, adapters: Adapters, is_long: bool
):
    num_cycles, num_first = (1000, 100) if is_long else (20, 5)
    others, other_copies = set(vllm_state(system)["adapters"]), set(copies(system))
    seen: list[Footprint] = []
    for number in range(num_cycles):
        # The bytes repeat, the version is another each time.
        deployments.served("cycled", adapters.publish(number % 4))
        assert say(client, "cycled", max_tokens=1) is not None
        deployments.delete("cycled")
        if number + 1 in (num_first, num_cycles):
            eventually(lambda: others >= set(vllm_state(system)["adapters"]) and other_copies >= set(copies(system)))
            seen.append(footprint(system))
    first, last = seen
    assert (last.registered, last.copies) == (first.registered, first.copies)
    eventually(lambda: len(held_adapters(system)) == len(vllm_state(system)["adapters"]))
    # Connections come and go by ones; a descriptor a cycle would be more.
    eventually(lambda: all(count <= first.num_files[name] + 5 for name, count in footprint(system).num_files.items()))
    if is_long:
        grown_mib = {name: last.memory_mib[name] - first.memory_mib[name] for name in first.memory_mib}
        assert all(grown < 32 for grown in grown_mib.values()), f"MiB over {num_cycles - num_first} cycles: {grown_mib}"


def eventually(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + QUIET_S
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come to that"
        time.sleep(0.05)
