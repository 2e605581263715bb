"""The system is started once for all tests that cross services: `tests/chaos` and `tests/e2e` share it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.system import System, start_system, stop_system, wait_served
from openai import OpenAI


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory, base_model_dir: Path) -> Iterator[System]:
    started = start_system(tmp_path_factory.mktemp("system"), base_model_dir)
    wait_served(started)
    yield started
    stop_system(started)
    assert started.process.returncode == 0, (started.layout.state_dir / "up.log").read_text()


@pytest.fixture
def client(system: System) -> OpenAI:
    return system.client()
