"""Which of an alias' versions answers a request.

Owns the split by weight: a key stays on its version, and a weight that grows moves no more keys than it must, all to the version that
grew (rendezvous hashing with weights: Schindelhauer and Schomaker, 2005). Leaves the weights to serving.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence

from finery_gateway.resources import Alias, Route, RouteTarget

_HASH_BITS = 53


def new_key() -> str:
    """For a request that names no caller: each has a draw of its own, the same for its second try."""
    return secrets.token_hex(8)


def targets_of(alias: Alias) -> tuple[RouteTarget, ...]:
    """What a route of the alias has as `targets` while it looks like this."""
    if alias.canary is None:
        return (RouteTarget(version=alias.version, weight=100),)
    serving = RouteTarget(version=alias.version, weight=100 - alias.canary.weight)
    return serving, RouteTarget(version=alias.canary.version, weight=alias.canary.weight)


def chosen(route: Route, *, key: str) -> Route:
    """The route to the version that answers requests of `key`."""
    if len(route.targets) < 2:
        return route
    return route.model_copy(update={"version": choose(route.targets, key=key)})


def choose(targets: Sequence[RouteTarget], *, key: str) -> str:
    """The version among `targets` that `key` belongs to."""
    return max(targets, key=lambda target: _score(target, key)).version


def _score(target: RouteTarget, key: str) -> float:
    digest = hashlib.blake2b(f"{target.version}\0{key}".encode(), digest_size=8).digest()
    draw = ((int.from_bytes(digest, "big") >> (64 - _HASH_BITS)) + 0.5) / 2**_HASH_BITS
    return target.weight / -math.log(draw)
