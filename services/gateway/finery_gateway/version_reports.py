"""How an alias' versions do beside each other: requests, errors, tokens and times, as metrics and for people to compare.

Owns the counts, since this process started, of the versions that an alias serves; what it serves no longer is forgotten. A base model is
not a version of anything and not counted here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from finery_gateway.metrics import version_families
from finery_gateway.usage import Usage

Outcome = Literal["answered", "refused", "failed", "cancelled"]
"""`refused` is the request's own fault, `failed` is not; `cancelled` by a client that left."""
OUTCOMES: tuple[Outcome, ...] = ("answered", "refused", "failed", "cancelled")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass
class Times:
    """Durations in seconds, by bucket."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    sum_s: float = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum_s += seconds

    @property
    def mean_s(self) -> float | None:
        """None before the first."""
        count = sum(self.counts)
        return self.sum_s / count if count else None

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: upper bounds, each with all that is below."""
        return list(zip([*map(str, _SECONDS), "+Inf"], map(float, accumulate(self.counts)), strict=True))


@dataclass
class VersionReport:
    """What one version of an alias has done."""

    requests: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_byte: Times = field(default_factory=Times)
    whole: Times = field(default_factory=Times)
    """From a request's arrival to the last byte of its answer, of those answered."""

    def count(self, outcome: Outcome) -> None:
        """One request more."""
        self.requests[outcome] += 1

    def finish(self, outcome: Outcome, usage: Usage) -> None:
        """One request more, whose answer had begun, with the tokens that it took."""
        self.count(outcome)
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens


class VersionReports(Collector):
    """Reports by project, alias and version. Registered with Prometheus, it is what a scrape shows."""

    def __init__(self) -> None:
        self._reports: dict[tuple[str, str], dict[str, VersionReport]] = {}
        self._kept: dict[str, dict[str, Set[str]]] = {}

    def of(self, project: str, alias: str, version: str) -> VersionReport:
        """The report to count in. What is counted after its version is gone is lost with it."""
        # Before the project's aliases are known, nothing can be told to be gone.
        is_gone = project in self._kept and version not in self._kept[project].get(alias, ())
        if version == alias or is_gone:
            return VersionReport()
        return self._reports.setdefault((project, alias), {}).setdefault(version, VersionReport())

    def peek(self, project: str, alias: str, version: str) -> VersionReport:
        """The report to show, empty where nothing was counted."""
        return self._reports.get((project, alias), {}).get(version) or VersionReport()

    def keep(self, project: str, alias: str, versions: Set[str]) -> None:
        """Forgets all other versions of the alias. Nothing is counted of them until they are kept again."""
        kept = self._kept.get(project, {})
        if versions:
            kept[alias] = versions
        else:
            kept.pop(alias, None)
        known = self._reports.get((project, alias), {})
        for version in known.keys() - versions:
            del known[version]
        if not known:
            self._reports.pop((project, alias), None)

    def keep_aliases(self, project: str, versions: Mapping[str, Set[str]]) -> None:
        """Forgets what is not in `versions`, those of every alias of the project."""
        self._kept[project] = dict(versions)
        for alias in [alias for owner, alias in self._reports if owner == project]:
            self.keep(project, alias, versions.get(alias, frozenset()))

    def describe(self) -> list[Metric]:
        """Empty families: which versions there are is known only while they serve."""
        return list(version_families(OUTCOMES))

    def collect(self) -> Iterator[Metric]:
        """Every report as it is now."""
        requests, tokens, first_byte, whole = version_families(OUTCOMES)
        # Scrapes come on a thread of their own, so what changes size meanwhile is copied first.
        for (project, alias), versions in list(self._reports.items()):
            for version, report in list(versions.items()):
                labels = [project, alias, version]
                for outcome, count in report.requests.items():
                    requests.add_metric([*labels, outcome], count)
                tokens.add_metric([*labels, "prompt"], report.prompt_tokens)
                tokens.add_metric([*labels, "completion"], report.completion_tokens)
                first_byte.add_metric(labels, report.first_byte.buckets, report.first_byte.sum_s)
                whole.add_metric(labels, report.whole.buckets, report.whole.sum_s)
        yield from (requests, tokens, first_byte, whole)
