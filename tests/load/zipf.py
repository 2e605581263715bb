"""Many aliases, few of them loaded, asked for by Zipf's law: throughput, how often what was asked for was there, who was turned away."""

from __future__ import annotations

import asyncio
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence

from load.client import Client, Reply, some_prompt
from load.installation import Installation
from load.swaps import Version

_LOADS = "finery_serving_adapter_load_seconds_count"


async def run_zipf(
    installation: Installation,
    client: Client,
    versions: Sequence[Version],
    *,
    metrics_url: str,
    num_streams: int,
    num_tokens: int,
    duration_s: float,
) -> dict[str, object]:
    """Deploys each of `versions` under an alias of its own, then asks for them for `duration_s`, the k-th as often as 1/k says.

    A 503 is asked for again by the next question, as any client would; it is counted.
    """
    words = {f"zipf-{number}": version.fingerprint.text for number, version in enumerate(versions)}
    for alias, version in zip(words, versions, strict=True):
        await installation.deploy(alias, version.artifact)
    aliases, weights = list(words), [1 / (number + 1) for number in range(len(words))]
    loads, ends_s = await asyncio.to_thread(_loads, metrics_url), time.monotonic() + duration_s

    async def ask(numbers: random.Random) -> list[tuple[str, Reply]]:
        seen = list[tuple[str, Reply]]()
        while time.monotonic() < ends_s:
            alias = numbers.choices(aliases, weights)[0]
            seen.append((alias, await client.stream(alias, prompt=some_prompt(numbers), num_tokens=num_tokens)))
        return seen

    started_s = time.monotonic()
    seen = [item for each in await asyncio.gather(*(ask(random.Random(number)) for number in range(num_streams))) for item in each]
    wall_s, loads = time.monotonic() - started_s, await asyncio.to_thread(_loads, metrics_url) - loads
    # By itself each of the most asked for is right or wrong whatever is beside it.
    by_themselves = [
        (alias, await client.stream(alias, prompt=some_prompt(random.Random(0)), num_tokens=num_tokens)) for alias in aliases[:8]
    ]
    whole = [(alias, reply) for alias, reply in seen if reply.is_whole]
    wrong = [(alias, reply) for alias, reply in whole if reply.text != words[alias] * num_tokens]
    return {
        "adapters": len(versions),
        "streams": num_streams,
        "requests": len(seen),
        "statuses": dict(Counter(str(reply.status) for _, reply in seen)),
        "wrong_words": len(wrong),
        "wrong_examples": [{"wanted": words[alias], "version": reply.version, "got": reply.text[:120]} for alias, reply in wrong[:5]],
        "wrong_by_themselves": sum(reply.text != words[alias] * num_tokens for alias, reply in by_themselves),
        "output_tokens_per_s": round(len(whole) * num_tokens / wall_s, 1),
        "loads": loads,
        "hit_rate": round(1 - loads / max(1, len(seen)), 4),
    }


def _loads(metrics_url: str) -> int:
    """Adapters that the agent has loaded into vLLM since it started."""
    with urllib.request.urlopen(metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(_LOADS)))
