"""A real server over a tiny random base, shared by the tests of this directory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from service.api.connection import connection_class
from service.api.deps import Desk
from service.api.door import Bounds
from service.app import create_app, shedder
from service.config import Settings
from service.net.listening import Listening
from tests.oracle import make_adapter, make_base
from tests.waiting import PATIENCE, until

__all__ = ["PATIENCE", "Running", "until"]


class Running:
    """An application behind a real socket, in a thread of this process."""

    def __init__(
        self,
        app: FastAPI,
        max_open: int = 1024,
        bounds: Bounds | None = None,
        filtered: bool = True,
    ) -> None:
        self.app = app
        asked = shedder(app) if isinstance(app, FastAPI) and hasattr(app.state, "desk") else None
        config = uvicorn.Config(
            app,
            port=0,
            http=connection_class(max_open, bounds, asked),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
        )
        self.server = Listening(config, filtered)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        host, port = self.server.servers[0].sockets[0].getsockname()[:2]
        self.address = (host, port)
        self.url = f"http://{host}:{port}"

    @property
    def desk(self) -> Desk:
        desk: Desk = self.app.state.desk
        return desk

    @property
    def engine(self) -> Any:
        assert self.desk.serving is not None
        return self.desk.serving.engine

    def settle(self) -> None:
        """Wait for what follows a reply: the end of its task, and of the step that counts it."""
        until(lambda: not self.server.server_state.tasks)
        self.engine.check_integrity()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny", "qwen3")


@pytest.fixture(scope="session")
def adapter_directory(tmp_path_factory: pytest.TempPathFactory, base_directory: Path) -> Path:
    home = tmp_path_factory.mktemp("adapters")
    for seed, kind in enumerate(("lora", "dora")):
        make_adapter(home / kind, base_directory, kind, rank=4, seed=seed + 1)
    return home


@pytest.fixture(scope="session")
def settings(
    tmp_path_factory: pytest.TempPathFactory, base_directory: Path, adapter_directory: Path
) -> Settings:
    return Settings(
        base=str(base_directory),
        precision="exact",
        home=tmp_path_factory.mktemp("home"),
        adapters=adapter_directory,
        port=0,
        kv_cache_bytes=8 << 20,
        max_queue=64,
        served_names="dummy,tgi,mini",
        max_upload_bytes=4 << 20,
        max_body_bytes=256 << 10,
        max_file_bytes=1 << 20,
    )


@pytest.fixture(scope="session")
def server(settings: Settings) -> Iterator[Running]:
    running = Running(create_app(settings))
    until(lambda: running.desk.admission.state in ("ready", "failed"))
    assert running.desk.failure is None
    yield running
    running.stop()


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as found:
        yield found
