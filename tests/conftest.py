"""What every test shares: a cache directory of the run, not the user's; and examples that are the
same in every run, however slow the machine is (`--hypothesis-profile=new` looks for others)."""

from __future__ import annotations

import random
import sys
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings

from tests import postgres

settings.register_profile(
    "same",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("new", settings.get_profile("same"), derandomize=False)
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _seed(f"{item.nodeid} setup")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item.nodeid)


def _seed(name: str) -> None:
    """What is drawn without a seed is the same in every run, whatever ran before in the process."""
    random.seed(zlib.crc32(name.encode()))
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(zlib.crc32(name.encode()))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny random bases are kept here, and by the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # Many write to one catalog at once, on a disk that others write to as well.
        patch.setattr("adapters.catalog.BUSY_SECONDS", 120)
        yield


@pytest.fixture(scope="session")
def empty_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog with its tables, to copy: making them takes a third of a second."""
    from adapters.catalog import Catalog

    path = tmp_path_factory.mktemp("catalog") / "catalog.db"
    Catalog(str(path)).close()
    return path


@pytest.fixture(scope="session")
def postgresql() -> Iterator[sa.URL]:
    """A PostgreSQL server of the tests' own, where one is installed."""
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed: .[postgres]")
    at = postgres.programs()
    if at is None:
        pytest.skip("no PostgreSQL server: neither initdb on the path nor /usr/lib/postgresql")
    with postgres.running(at) as url:
        yield url


@pytest.fixture
def postgresql_database(postgresql: sa.URL) -> Iterator[str]:
    """The URL of an empty database."""
    with postgres.database(postgresql, f"test_{uuid.uuid4().hex}") as url:
        yield url
