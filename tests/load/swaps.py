"""Swaps of one alias under continuous streams: who failed, who was mixed, who came too late, what it took, what it left behind.

Every version says a word of its own (`fingerprints`), so that a stream tells which versions made it. `bare` measures what a swap cannot do
without, under the same streams: vLLM's own load and one probe.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from load.client import Client, Reply, some_prompt
from load.fingerprints import BaseFolder, Fingerprint, fingerprints, write_adapter
from load.installation import Footprint, Installation

from finery_common.artifacts import ArtifactRef
from finery_gateway.resources import Artifact
from finery_serving.aliases import version_of


@dataclass(frozen=True)
class Version:
    """An adapter that is published, and its word."""

    artifact: Artifact
    folder: Path
    fingerprint: Fingerprint

    @property
    def name(self) -> str:
        return version_of(ArtifactRef(**self.artifact.model_dump()))[0]


@dataclass(frozen=True)
class Seen:
    """A reply to a stream that began when `num_flips` flips were known to its client."""

    reply: Reply
    num_flips: int


@dataclass
class Swaps:
    """Swaps and the streams beside them, so far. `order` has the version before the first swap, then each swap's."""

    num_tokens: int
    words: dict[str, str]
    order: list[str]
    seen: list[Seen] = field(default_factory=list)
    begun_s: list[float] = field(default_factory=list)
    """When each swap was asked for."""
    flipped_s: list[float] = field(default_factory=list)
    """When each was seen to have flipped."""
    swap_s: list[float] = field(default_factory=list)
    """What each took from staged to flipped, as the service measures it."""
    footprints: list[Footprint] = field(default_factory=list)
    """After each swap."""

    @property
    def failed(self) -> list[Reply]:
        """Answers that did not come whole."""
        return [item.reply for item in self.seen if not item.reply.is_whole]

    @property
    def mixed(self) -> list[Reply]:
        """Whole answers that are not, from the first token to the last, the word of the version they name."""
        whole = [item.reply for item in self.seen if item.reply.is_whole]
        return [reply for reply in whole if reply.text != self.words.get(reply.version, "") * self.num_tokens]

    @property
    def outdated(self) -> list[Seen]:
        """Answers by a version that had been replaced, as their client could know, when they were asked for."""
        return [item for item in self.seen if item.reply.is_whole and item.reply.version not in self._may_answer(item)]

    def _may_answer(self, item: Seen) -> list[str]:
        newest = sum(begun_s < item.reply.first_s for begun_s in self.begun_s)
        return self.order[item.num_flips : newest + 1]


@dataclass(frozen=True)
class Bare:
    """Seconds of what every swap must do: vLLM's own load of an adapter, and one probe of it."""

    load_s: Sequence[float]
    probe_s: Sequence[float]


def publish_versions(
    installation: Installation, base: BaseFolder, folder: Path, *, count: int, num_words: int, everywhere: bool = False
) -> list[Version]:
    """`count` adapters, published, that say `num_words` words in turns."""
    words = fingerprints(base, num_words)
    for number, word in enumerate(words):
        write_adapter(base, folder / str(number), word, seed=number, everywhere=everywhere)
    folders = [folder / str(number % num_words) for number in range(count)]
    return [Version(installation.publish(place), place, words[number % num_words]) for number, place in enumerate(folders)]


async def first_version(installation: Installation, alias: str, versions: Sequence[Version], *, num_tokens: int) -> Swaps:
    """Deploys the first of `versions`, which the swaps are to begin with."""
    await installation.deploy(alias, versions[0].artifact)
    await installation.drained(alias)
    return Swaps(num_tokens, {version.name: version.fingerprint.text for version in versions}, [versions[0].name])


@contextlib.asynccontextmanager
async def streaming(client: Client, model: str, swaps: Swaps, *, num_streams: int) -> AsyncIterator[None]:
    """`num_streams` streams at a time while the block runs, each followed by the next; those open at its end are read to theirs."""
    is_over = False

    async def ask(numbers: random.Random) -> None:
        while not is_over:
            num_flips = len(swaps.flipped_s)
            reply = await client.stream(model, prompt=some_prompt(numbers), num_tokens=swaps.num_tokens)
            swaps.seen.append(Seen(reply, num_flips))

    tasks = [asyncio.create_task(ask(random.Random(number))) for number in range(num_streams)]
    try:
        yield
    finally:
        is_over = True
        await asyncio.gather(*tasks)


async def swap(installation: Installation, alias: str, version: Version, swaps: Swaps) -> None:
    """One swap to its flip; the version before it drains beside the next one."""
    swaps.order.append(version.name)
    swaps.begun_s.append(time.monotonic())
    flipped = await installation.deploy(alias, version.artifact)
    swaps.flipped_s.append(time.monotonic())
    swaps.swap_s.append(flipped.rollout.swap_seconds)
    swaps.footprints.append(await installation.footprint())


async def measure_bare(installation: Installation, folder: Path, *, count: int) -> Bare:
    """Loads the adapter in `folder` under new names past the agent, probes and unloads it."""
    replica, load_s, probe_s = installation.replica, list[float](), list[float]()
    for number in range(count):
        name, started_s = f"bare-{number}", time.perf_counter()
        await replica.load(name, path=folder)
        loaded_s = time.perf_counter()
        await replica.admit(name)
        admitted_s = time.perf_counter()
        await replica.probe(name, alias=name)
        probe_s.append(time.perf_counter() - admitted_s)
        load_s.append(loaded_s - started_s)
        await replica.retire(name)
        await replica.unload(name, adapter_id=(await replica.state()).adapters[name].id)
    return Bare(load_s, probe_s)


@dataclass(frozen=True)
class Margins:
    """Log-probabilities' differences: the smallest between a fingerprint's token and the next, and the largest between equal requests in
    batches of different size.
    """

    margin: float
    noise: float


async def measure_margins(client: Client, *, base_model: str, aliases: Sequence[str], num_tokens: int, num_beside: int) -> Margins:
    """Asks each of `aliases` and the base model the same alone and among `num_beside` other requests."""
    numbers = random.Random(0)
    margins, differences = list[float](), list[float]()
    for model in (base_model, *aliases):
        prompt = some_prompt(numbers)
        alone = await client.logprobs(model, prompt=prompt, num_tokens=num_tokens)
        others = [client.stream(base_model, prompt=some_prompt(numbers), num_tokens=num_tokens + number) for number in range(num_beside)]
        beside = asyncio.gather(*others)
        among = await client.logprobs(model, prompt=prompt, num_tokens=num_tokens)
        await beside
        differences += _differences(alone, among)
        if model != base_model:
            margins += [first - second for place in (*alone, *among) for first, second in [sorted(place.values(), reverse=True)[:2]]]
    return Margins(min(margins), max(differences))


def _differences(alone: Sequence[dict[str, float]], among: Sequence[dict[str, float]]) -> list[float]:
    """Of the tokens that both have in front, until a near tie sends them different ways."""
    found = list[float]()
    for one, other in zip(alone, among, strict=True):
        found += [abs(value - other[token]) for token, value in one.items() if token in other]
        if max(one, key=lambda token: one[token]) != max(other, key=lambda token: other[token]):
            break
    return found


def summary(swaps: Swaps, bare: Bare, margins: Margins) -> dict[str, object]:
    """What is reported of a run; seconds, bytes, counts."""
    whole = [item.reply for item in swaps.seen if item.reply.is_whole]
    wall_s = max(reply.ended_s for reply in whole) - min(reply.started_s for reply in whole)
    first, last = swaps.footprints[min(len(swaps.footprints) - 1, 19)], swaps.footprints[-1]
    return {
        "swaps": len(swaps.swap_s),
        "requests": len(swaps.seen),
        "failed": len(swaps.failed),
        "failures": dict(Counter(f"{reply.status} after {reply.ended_s - reply.started_s:.0f} s: {reply.error}" for reply in swaps.failed)),
        "mixed": len(swaps.mixed),
        "outdated": len(swaps.outdated),
        "output_tokens_per_s": round(len(whole) * swaps.num_tokens / wall_s, 1),
        "logit_margin": round(margins.margin, 2),
        "batch_noise": float(f"{margins.noise:.3g}"),
        **_percentiles("swap_s", swaps.swap_s),
        **_percentiles("asked_to_seen_s", [flipped_s - begun_s for begun_s, flipped_s in zip(swaps.begun_s, swaps.flipped_s, strict=True)]),
        **_percentiles("bare_load_s", bare.load_s),
        **_percentiles("bare_probe_s", bare.probe_s),
        "vllm_rss_mib_after_20": first.vllm_rss_bytes >> 20,
        "vllm_rss_mib_at_end": last.vllm_rss_bytes >> 20,
        "agent_rss_mib_after_20": first.agent_rss_bytes >> 20,
        "agent_rss_mib_at_end": last.agent_rss_bytes >> 20,
        "max_registered": max(item.num_registered for item in swaps.footprints),
        "max_held": max(item.num_held for item in swaps.footprints),
        "fds_after_20": first.num_fds,
        "fds_at_end": last.num_fds,
    }


def _percentiles(name: str, values_s: Sequence[float]) -> dict[str, object]:
    cuts = statistics.quantiles(values_s, n=100, method="inclusive")
    return {f"{name}_p50": round(cuts[49], 4), f"{name}_p99": round(cuts[98], 4)}
