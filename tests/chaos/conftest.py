"""What the faults are put to: the session's system, its store and its deployments; `FINERY_CHAOS=long` for the long form (`make chaos`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.adapters import Adapters
from chaos.serving import Deployments
from e2e.system import System


@pytest.fixture(scope="session")
def is_long() -> bool:
    """Whether there is time for everything, as in `make chaos`."""
    return os.environ.get("FINERY_CHAOS", "") == "long"


@pytest.fixture(scope="session")
def adapters(system: System, base_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(system, base_model_dir, memo_dir=tmp_path_factory.mktemp("digests"))


@pytest.fixture(scope="session")
def deployments(system: System) -> Iterator[Deployments]:
    made = Deployments(system)
    yield made
    made.channel.close()
