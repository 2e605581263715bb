"""Which replica ought to hold which version. One rule, which every agent works out for itself from what all of them see.

Every version has a copy as long as there is room. Room beyond that goes to copies of what is asked for most, each copy to the version with
the most requests per copy (D'Hondt's method). Where the copies of an alias lie is its own ranking of the replicas (rendezvous hashing):
the next version of an alias lands where the one before it is, and a replica that comes or goes moves only what lies on it.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from finery_serving.records import Alias, Rollout
from finery_serving.registry import Registry


@dataclass(frozen=True)
class Wanted:
    """A version to place. `key` names its alias, `rate` is in requests a second, `is_pinned` goes before all others."""

    version: str
    key: str
    rate: float = 0.0
    is_pinned: bool = False


def place(wanted: Sequence[Wanted], *, room: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """The ids of the replicas for each version, the first ranked first; `room` is how many versions each replica holds.

    Of equals, what comes first in `wanted` goes first. What there is no room for has no replica.
    """
    left = dict(room)
    found: dict[str, tuple[str, ...]] = {item.version: () for item in wanted}
    queue = [(_precedence(item, copies=0), number) for number, item in enumerate(wanted)]
    heapq.heapify(queue)
    while queue:
        _, number = heapq.heappop(queue)
        item = wanted[number]
        replica = next((name for name in ranked(item.key, left) if left[name] > 0 and name not in found[item.version]), None)
        if replica is None:
            continue
        left[replica] -= 1
        found[item.version] += (replica,)
        heapq.heappush(queue, (_precedence(item, copies=len(found[item.version])), number))
    return found


def ranked(key: str, replicas: Iterable[str]) -> list[str]:
    """`replicas` in the order in which `key` prefers them."""
    return sorted(replicas, key=lambda name: hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest())


def _precedence(item: Wanted, *, copies: int) -> tuple[bool, bool, float]:
    """Small goes first: first copies, then pinned ones, then by requests per copy."""
    # In powers of two, so that what is asked for about as much as before stays where it is.
    weight = 2.0 ** round(math.log2(item.rate)) if item.rate > 0 else 0.0
    return copies > 0, not item.is_pinned, -(weight + 2.0**-20) / (copies + 1)


class Placement:
    """The rule over what the database wants of one base model and its replicas whose vLLM answers. Other base models' are left out."""

    def __init__(self, *, registry: Registry) -> None:
        self._registry = registry

    def of(self, aliases: Sequence[Alias], rollouts: Sequence[Rollout]) -> dict[str, tuple[str, ...]]:
        """The ids of replicas for each version of the pool's base model that is wanted, on its way or serving."""
        base_model, asked = self._registry.base_model, self._registry.rates
        rates = {(alias.project, alias.alias): asked.get(alias.version, 0.0) for alias in aliases}
        wanted: dict[str, Wanted] = {}
        for rollout in rollouts:
            if rollout.state.is_before_flip and rollout.base_model == base_model:
                key = (rollout.project, rollout.alias)
                # Before all others: somebody waits for it, and what it takes the place of goes soon.
                wanted.setdefault(rollout.version, Wanted(rollout.version, "/".join(key), rates.get(key, 0.0), is_pinned=True))
        for alias in aliases:
            for served in alias.serving if alias.base_model == base_model else ():
                rate, is_pinned = asked.get(served.version, 0.0), alias.pinned and served.version == alias.version
                wanted.setdefault(served.version, Wanted(served.version, f"{alias.project}/{alias.alias}", rate, is_pinned))
        return place(list(wanted.values()), room={replica.id: replica.max_resident for replica in self._registry.ready})

    @staticmethod
    def preferred(alias: Alias, replicas: Iterable[str]) -> list[str]:
        """`replicas` in the order in which the alias' versions are placed on them."""
        return ranked(f"{alias.project}/{alias.alias}", replicas)
