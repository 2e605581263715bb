"""The words of which dashboards are written: panels, choices, boards, and the PromQL of histograms."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What a panel shows: PromQL by the legend of its series."""

    title: str
    unit: str
    queries: dict[str, str]
    text: str = ""
    is_number: bool = False
    """The last value alone, large."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A variable that the reader chooses: the values of `label` that `metric` has."""

    name: str
    metric: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Board:
    """A dashboard: rows of panels."""

    uid: str
    title: str
    choices: tuple[Choice, ...]
    rows: dict[str, tuple[Panel, ...]]


def p95(metric: str, by: str, matching: str = "", *, quantile: float = 0.95) -> str:
    """What one observation in twenty exceeds, or another quantile. `by` are labels, each with a comma behind it."""
    return f"histogram_quantile({quantile}, sum by ({by}le) (rate({metric}_bucket{matching}[$__rate_interval])))"


def mean(metric: str, by: str, matching: str = "") -> str:
    """Of a histogram's observations."""
    return (
        f"sum by ({by}) (rate({metric}_sum{matching}[$__rate_interval])) / sum by ({by}) (rate({metric}_count{matching}[$__rate_interval]))"
    )


def quantiles(metric: str, matching: str = "") -> dict[str, str]:
    """Median, 95 % and mean of a histogram, by legend."""
    return {"half": p95(metric, "", matching, quantile=0.5), "95 %": p95(metric, "", matching), "mean": mean(metric, "job", matching)}
