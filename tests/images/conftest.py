"""Images are built once for all tests of a run, each when the first test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from images.containers import Image, Store, absent, forbidden


@pytest.fixture(scope="session")
def image_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """An image store with the base in it."""
    if programs := absent():
        pytest.fail(f"{', '.join(programs)} missing; `make setup-system` installs them", pytrace=False)
    if reason := forbidden():
        pytest.skip(f"images cannot be built: {reason}")
    store = Store(tmp_path_factory.mktemp("image-store"))
    try:
        store.add_base()
        yield store
    finally:
        store.remove()


@pytest.fixture(scope="session")
def image_of(image_store: Store) -> Callable[[str], Image]:
    """Answers the image of a service."""
    return cache(image_store.build)
