"""What an API key may use in a minute, and the arithmetic that keeps to it.

A limit of N a minute is a bucket of N that fills at N/60 a second, kept as one number, the moment at which it is full again: the generic
cell rate algorithm (ITU-T I.371; https://brandur.org/rate-limiting). A key that was idle may use a whole minute's worth at once. Costs
settled later may push that moment beyond a minute from now: a debt, waited off before anything else goes through.

Where these moments are kept is `limit_table`'s business, what a request costs `admission`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from finery_common.errors import InvalidArgumentError

PERIOD_S = 60.0
MAX_PER_MINUTE = 1_000_000_000
MAX_STREAMS = 10_000
# Moments are sums of many small floats.
_EPSILON_S = 1e-4


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """The limits of one key; None is unlimited. Raises InvalidArgumentError for a number out of bounds."""

    requests_per_minute: int | None = None
    """Requests of any kind over REST."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and of what is generated."""
    concurrent_streams: int | None = None
    """Generations at one time, streamed or whole."""

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            most = MAX_STREAMS if name == "concurrent_streams" else MAX_PER_MINUTE
            if not 1 <= value <= most:
                raise InvalidArgumentError(f"{name}: got {value}, wanted 1 to {most}, or none for unlimited", param=name)

    def given(self) -> dict[str, int]:
        """The limits that there are, by name."""
        values: dict[str, int | None] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


LIMIT_NAMES = tuple(field.name for field in fields(KeyLimits))


@dataclass(frozen=True)
class Bucket:
    """How much of a limit is left at one moment."""

    limit: int
    full_at_s: float
    now_s: float

    @property
    def reset_s(self) -> float:
        """Seconds until nothing of the limit is used."""
        return max(0.0, self.full_at_s - self.now_s)

    @property
    def remaining(self) -> int:
        """What could be taken now."""
        return max(0, math.floor((PERIOD_S - self.reset_s + _EPSILON_S) * self.limit / PERIOD_S))

    def after(self, cost: int) -> Bucket:
        """The bucket once `cost` more is used; a negative one gives back."""
        return Bucket(self.limit, max(self.full_at_s, self.now_s) + cost * PERIOD_S / self.limit, self.now_s)

    def wait_s(self, cost: int) -> float:
        """Seconds until `cost` can be taken: 0 where it can now, infinite where it is more than the bucket holds."""
        if cost > self.limit:
            return math.inf
        wait_s = self.after(cost).reset_s - PERIOD_S
        return wait_s if wait_s > _EPSILON_S else 0.0


@dataclass(frozen=True)
class Standing:
    """A key's buckets at one moment; None where there is no such limit."""

    requests: Bucket | None = None
    tokens: Bucket | None = None


@dataclass(frozen=True)
class Refusal:
    """Which limit is in the way and for how long. `wait_s` is infinite for what never fits, and None where nobody can tell."""

    limit: str
    wait_s: float | None
