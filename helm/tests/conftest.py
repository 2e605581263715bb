"""The chart, loaded once, and its manifests by values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import helm_python
import pytest
from chart_rendering import CHART_DIR, Manifests, manifests_of


@pytest.fixture(scope="session")
def chart() -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(CHART_DIR) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def render(chart: helm_python.Chart) -> Callable[[Mapping[str, Any]], Manifests]:
    """Renders by values, remembered: most tests look at the same few."""
    known: dict[str, Manifests] = {}

    def rendered(values: Mapping[str, Any]) -> Manifests:
        key = json.dumps(values, sort_keys=True)
        if key not in known:
            known[key] = manifests_of(chart, values)
        return known[key]

    return rendered


@pytest.fixture(scope="session")
def update_snapshots() -> bool:
    """`make helm-test UPDATE=1` writes them anew."""
    return bool(os.environ.get("FINERY_UPDATE_SNAPSHOTS"))
