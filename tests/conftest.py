"""What every test shares: a cache directory of the run, not the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny random bases are kept here, and by the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def empty_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog with its tables, to copy: making them takes a third of a second."""
    from adapters.catalog import Catalog

    path = tmp_path_factory.mktemp("catalog") / "catalog.db"
    Catalog(str(path)).close()
    return path
