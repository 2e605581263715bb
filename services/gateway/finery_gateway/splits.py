"""Which of an alias' versions answers a request.

Owns the split by weight: a key stays on its version, and a weight that grows moves no more keys than it must, all to the version that
grew (rendezvous hashing with weights: Schindelhauer and Schomaker, 2005). Leaves the weights to serving.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence

from finery_gateway.resources import Alias, RouteTarget

_HASH_BITS = 53


def new_key() -> str:
    """For a request that names no caller: each has a draw of its own, the same for its further tries."""
    return secrets.token_hex(8)


def targets_of(alias: Alias) -> tuple[RouteTarget, ...]:
    """What a route of the alias has as `targets` while it looks like this, less their replicas."""
    if alias.canary is None:
        return (RouteTarget(version=alias.version, weight=100),)
    serving = RouteTarget(version=alias.version, weight=100 - alias.canary.weight)
    return serving, RouteTarget(version=alias.canary.version, weight=alias.canary.weight)


def chosen(targets: Sequence[RouteTarget], *, key: str) -> RouteTarget:
    """The one of `targets` that answers requests of `key`."""
    return targets[0] if len(targets) == 1 else max(targets, key=lambda target: _score(target, key))


def _score(target: RouteTarget, key: str) -> float:
    digest = hashlib.blake2b(f"{target.version}\0{key}".encode(), digest_size=8).digest()
    draw = ((int.from_bytes(digest, "big") >> (64 - _HASH_BITS)) + 0.5) / 2**_HASH_BITS
    return target.weight / -math.log(draw)
