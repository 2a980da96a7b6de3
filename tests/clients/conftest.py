"""The embedded base with its samples behind a real socket, for the clients that others wrote."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.app import create_app
from service.config import SAMPLES, Settings
from tests.service.api.conftest import Running, until


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(
        precision="exact",
        home=tmp_path_factory.mktemp("clients"),
        adapters=SAMPLES,
        port=0,
        kv_cache_bytes=64 << 20,
        served_names="dummy,tgi,gpt-4o-mini,gpt-6-astra,gpt-3.5-turbo-instruct,"
        "text-embedding-3-small",
    )
    running = Running(create_app(settings))
    until(lambda: running.desk.admission.state in ("ready", "failed"))
    assert running.desk.failure is None
    yield running
    running.stop()
