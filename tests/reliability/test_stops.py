"""A server that has to stop, with requests in it: each accepted one gets an answer. In a thread
here; as processes in stops.py."""

from __future__ import annotations

import signal
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from service.api.connection import connection_class
from service.api.deps import Desk
from service.app import Server, create_app
from service.config import Settings
from tests.oracle import make_base
from tests.reliability.stops import BROKEN, TERMINATED, broken, terminated, wrong_with
from tests.waiting import PATIENCE, until

CLIENTS = 8
NUMBER = b"x-number"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny", "llama")


class Serving:
    """A server in a thread, and clients that ask it again and again, each by a new connection."""

    def __init__(self, base: Path, home: Path) -> None:
        settings = Settings(base=str(base), home=home, adapters=None, kv_cache_bytes=4 << 20)
        app = create_app(settings)
        self.desk: Desk = app.state.desk
        self.begun: set[bytes] = set()  # the numbers of requests that reached the application

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            self.begun.update(value for name, value in scope.get("headers", ()) if name == NUMBER)
            await app(scope, receive, send)

        config = uvicorn.Config(noting, port=0, log_config=None, http=connection_class(1024))
        self.server = Server(config, self.desk)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.desk.admission.state == "ready")
        self.address = self.server.servers[0].sockets[0].getsockname()[:2]
        self.counted: Counter[str] = Counter()
        self._going = True
        self._clients = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]

    def load(self) -> None:
        for client in self._clients:
            client.start()
        until(lambda: self.counted["200"] >= 2 * CLIENTS)

    def end(self) -> None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self._going = False
        for client in self._clients:
            client.join(PATIENCE)

    def _ask(self) -> None:
        url = "http://{}:{}/generate".format(*self.address)
        body = {"inputs": "a", "parameters": {"max_new_tokens": 12, "ignore_eos": True}}
        while self._going:
            number = uuid.uuid4().hex
            named = {NUMBER.decode(): number}
            try:
                reply = httpx.post(url, json=body, headers=named, timeout=PATIENCE)
            except httpx.ConnectError:
                return  # the door is closed
            except httpx.TransportError as error:
                # What is admitted keeps the door open. What comes as it closes may not be taken.
                late = number.encode() not in self.begun
                self.counted["late" if late else f"lost: {error!r}"] += 1
                return
            self.counted[str(reply.status_code)] += 1
            if reply.status_code == 200 and len(reply.json()["generated_text"]) == 0:
                self.counted["empty"] += 1


@pytest.fixture
def serving(base: Path, tmp_path: Path) -> Iterator[Serving]:
    found = Serving(base, tmp_path)
    yield found
    found.server.should_exit = True
    found.end()


def test_sigterm_under_load_loses_nothing(serving: Serving) -> None:
    serving.load()
    serving.server.handle_exit(signal.SIGTERM, None)
    serving.end()
    assert set(serving.counted) <= {"200", "503", "late"}, serving.counted
    assert serving.desk.failure is None
    assert serving.desk.admission.inside == 0


def test_an_engine_that_fails_answers_and_ends_the_process(serving: Serving) -> None:
    """`serve` then exits with 1, and whoever watches the process starts another."""
    serving.load()
    assert serving.desk.serving is not None

    def explode(*_: Any) -> None:
        raise RuntimeError("no memory left")

    serving.desk.serving.engine._runner.run = explode  # type: ignore[assignment, method-assign]
    serving.end()
    assert serving.counted["500"] >= 1, serving.counted
    assert set(serving.counted) <= {"200", "500", "503", "late"}, serving.counted
    assert serving.desk.failure is not None
    assert "engine failed" in serving.desk.failure


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_process_ends_as_it_should(base: Path, tmp_path: Path) -> None:
    """An orchestrator sees 1 where the engine broke, and 0 after SIGTERM."""
    counted, _ = broken(tmp_path, str(base))
    assert wrong_with(counted, 1, BROKEN) == []
    assert counted["exit 1"] == 1
    for after in (0.2, 0.5, 0.9):
        counted = terminated(tmp_path, str(base), after)
        assert wrong_with(counted, 0, TERMINATED) == []
        assert counted["exit 0"] == 1
