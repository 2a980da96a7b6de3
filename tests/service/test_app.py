"""The life of a server: start, drain, stop, and what is left after a kill."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from service.app import Server, create_app, serve
from service.config import Settings
from tests.oracle import make_adapter, make_base
from tests.waiting import until
from tests.zoo import slowly

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0  # seconds; a bound for a broken server, not a measurement
# As `nibble serve`; and as long as the second argument is a file, each step takes a while.
SERVE = """
import sys, time
from pathlib import Path
from service.admission import Admission
from service.app import serve
from service.config import Settings

slow, open_door = Path(sys.argv[2]), Admission.open

def open_slowed(self, *given):
    from service.engine.model_runner import ModelRunner  # which the server has loaded by now

    run = ModelRunner.run

    def slowed(*step):
        time.sleep(0.05 * slow.exists())
        return run(*step)

    ModelRunner.run = slowed
    open_door(self, *given)

Admission.open = open_slowed
serve(Settings.model_validate_json(sys.argv[1]))
"""


@dataclass(frozen=True)
class Started:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    slow: Path
    clients: ExitStack

    def lines(self, event: str) -> list[dict[str, Any]]:
        found = (json.loads(line) for line in self.log.read_text().splitlines() if line[:1] == "{")
        return [line for line in found if line.get("event") == event]

    def wait_for(self, event: str) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while not (found := self.lines(event)):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"no {event!r} in the log"
            time.sleep(0.05)
        return found[0]

    @property
    def url(self) -> str:
        return str(self.wait_for("listening")["url"])

    def ready(self) -> httpx.Client:
        self.wait_for("ready")
        client = self.clients.enter_context(httpx.Client(base_url=self.url, timeout=PATIENCE))
        while client.get("/ready").status_code != 200:  # logged a moment before it is open
            time.sleep(0.01)
        return client


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny", "llama")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """A function that starts a server; all of them are gone afterwards."""
    processes = []

    def start(**settings: Any) -> Started:
        fields = {
            "port": 0,
            "home": str(tmp_path / "home"),
            "adapters": None,
            "log_format": "json",
            "log_level": "debug",
            "kv_cache_bytes": 4 << 20,
            **settings,
        }
        log = tmp_path / f"log-{len(processes)}"
        slow = tmp_path / f"slow-{len(processes)}"
        with log.open("wb") as sink:
            command = [sys.executable, "-c", SERVE, json.dumps(fields), str(slow)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink)
        processes.append(process)
        return Started(process, log, slow, clients)

    with ExitStack() as clients:
        yield start
    for process in processes:
        process.kill()
        process.wait()


def test_sigterm_finishes_what_runs_and_takes_nothing_new(
    started: Any, base_directory: Path
) -> None:
    server = started(base=str(base_directory))
    # Alive and honest from the first moment, long before the base is there.
    assert httpx.get(f"{server.url}/health").json() == {"status": "alive"}
    client = server.ready()
    assert re.search(r'nibble:connections{.*state="open"} 1.0', client.get("/metrics").text)
    parameters = {"max_new_tokens": 600, "ignore_eos": True}
    body = {"inputs": "two boats left", "parameters": parameters}
    events: list[dict[str, Any]] = []
    first = threading.Event()
    server.slow.touch()

    def read() -> None:
        with client.stream("POST", "/generate_stream", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data:"):
                    events.append(json.loads(line[5:]))
                    first.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert first.wait(PATIENCE)
    server.process.send_signal(signal.SIGTERM)
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as late:
        while (ready := late.get("/ready")).status_code == 200:  # until the signal is seen
            time.sleep(0.01)
        refused = late.post("/generate", json=body)
        alive = late.get("/health")
    assert len(events) < 600, "the stream ended too early to show anything"
    server.slow.unlink()
    assert ready.status_code == refused.status_code == 503
    assert refused.json()["error_type"] == "draining"
    assert "retry-after" in refused.headers
    assert alive.status_code == 200
    reader.join(PATIENCE)
    assert len(events) == 600
    assert events[-1]["details"]["finish_reason"] == "length"
    assert server.process.wait(PATIENCE) == 0
    assert "Traceback" not in server.log.read_text()


def test_drain_is_bounded(base_directory: Path, tmp_path: Path) -> None:
    """What does not finish in drain_seconds is told so, and the server still stops in order."""
    settings = Settings(
        base=str(base_directory),
        home=tmp_path,
        adapters=None,
        drain_seconds=0.2,
        kv_cache_bytes=4 << 20,
    )
    app = create_app(settings)
    server = Server(uvicorn.Config(app, port=0, log_config=None), app.state.desk)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: app.state.desk.admission.state == "ready", PATIENCE)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1000, "ignore_eos": True}}
    with (
        httpx.Client(base_url=f"http://{host}:{port}", timeout=PATIENCE) as client,
        slowly(app.state.desk.serving.engine),
        client.stream("POST", "/generate_stream", json=body) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        server.handle_exit(signal.SIGTERM, None)
        rest = [line for line in lines if line.startswith("data:")]
    assert len(rest) < 999
    assert json.loads(rest[-1][5:])["error_type"] == "draining"
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not app.state.desk.serving.engine.alive


def test_a_base_that_cannot_be_loaded_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("service.app.configure_logging", lambda level, layout: None)
    settings = Settings(base=str(tmp_path / "empty"), home=tmp_path, adapters=None, port=0)
    with pytest.raises(SystemExit, match=r"could not be loaded: .*has no config\.json"):
        serve(settings)


def test_a_store_that_does_not_answer_is_not_called_a_bad_base(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base_directory: Path
) -> None:
    monkeypatch.setattr("service.app.configure_logging", lambda level, layout: None)
    (tmp_path / "rows").mkdir()
    where = {"catalog": f"sqlite:///{tmp_path / 'rows'}", "adapters": None, "port": 0}
    settings = Settings(base=str(base_directory), home=tmp_path, **where)
    with pytest.raises(SystemExit, match="the server could not start: the catalog failed"):
        serve(settings)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base_directory: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "a", base_directory, "lora", rank=2)


def push(client: httpx.Client, name: str, adapter: Path) -> httpx.Response:
    files = {
        "config": (adapter / "adapter_config.json").read_bytes(),
        "weights": (adapter / "adapter_model.safetensors").read_bytes(),
    }
    return client.post("/adapters", data={"name": name}, files=files)


def test_kill_in_the_middle_of_an_upload(
    started: Any, base_directory: Path, adapter: Path, tmp_path: Path
) -> None:
    """What was acknowledged is there after a restart; a half upload and its file are not."""
    server = started(base=str(base_directory))
    client = server.ready()
    kept = push(client, "kept", adapter)
    assert kept.status_code == 201
    body = {"inputs": "a b c", "parameters": {"adapter_id": "kept", "max_new_tokens": 8}}
    text = client.post("/generate", json=body).json()["generated_text"]

    host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
    half = (
        b"POST /adapters HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4000000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nhalf\r\n'
        b'--b\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
    )
    uploads = tmp_path / "home" / "uploads"
    with socket.create_connection((host, port)) as connection:
        connection.sendall(half + b"w" * 3_000_000)
        # Until bytes of it are on the disk.
        until(lambda: any(path.stat().st_size for path in uploads.iterdir()), PATIENCE)
        server.process.kill()
        server.process.wait()
    assert list(uploads.iterdir()), "the kill came too late to show anything"

    again = started(base=str(base_directory))
    client = again.ready()
    assert again.wait_for("store")["uploads_swept"] == 1
    assert list(uploads.iterdir()) == []
    listed = {one["name"]: one["digest"] for one in client.get("/adapters").json()["adapters"]}
    assert listed == {"kept": kept.json()["digest"]}
    assert client.post("/generate", json=body).json()["generated_text"] == text
    # The first signal drains, the second one does not wait.
    again.slow.touch()
    slow = {"inputs": "a", "parameters": {"max_new_tokens": 1000, "ignore_eos": True}}
    with client.stream("POST", "/generate_stream", json=slow) as reply:
        next(reply.iter_lines())
        again.process.send_signal(signal.SIGTERM)
        while client.get("/ready").status_code == 200:
            time.sleep(0.01)
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(PATIENCE) == 128 + signal.SIGTERM


def test_first_signal_drains_second_exits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path, adapters=None))
    server = Server(uvicorn.Config(app, log_config=None), app.state.desk)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    server.handle_exit(signal.SIGTERM, None)
    assert app.state.desk.admission.state == "draining"
    assert left == []
    server.handle_exit(signal.SIGINT, None)
    assert left == [130]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/fine_tuning/jobs"),
        ("GET", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/fine_tuning/jobs/ftjob-1/resume"),
        ("POST", "/v1/files"),
        ("GET", "/v1/files/file-1/content"),
    ],
)
def test_training_over_http_can_be_turned_off(method: str, path: str, tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path, fine_tuning=False))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path)

    reply = asyncio.run(ask())
    assert reply.status_code == 404
    assert "fine_tuning is off here" in reply.json()["error"]["message"]
    shut = ("/v1/fine_tuning", "/v1/files")
    assert not [one for one in app.openapi()["paths"] if one.startswith(shut)]
    assert "/generate" in app.openapi()["paths"]
