"""Two servers over one PostgreSQL and one directory of blobs, each with a home of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.config import SAMPLES

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = "the operator's own key"
PATIENCE = 400.0
SEEN = 1.0  # seconds until the other server knows
CIPHER, TICKETS = SAMPLES / "cipher", SAMPLES / "tickets"
SERVE = (
    "import sys; from service.app import serve; from service.config import Settings; "
    "serve(Settings.model_validate_json(sys.argv[1]))"
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def pair(postgresql_database: str, tmp_path: Path) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Both start at once over an empty database."""
    with ExitStack() as stack:
        logs = [tmp_path / f"log-{number}" for number in range(2)]
        for number, log in enumerate(logs):
            fields = {
                "home": str(tmp_path / f"home-{number}"),
                "blobs": (tmp_path / "blobs").as_uri(),
                "catalog": postgresql_database,
                "port": 0,
                "adapters": None,
                "admin_key": OPERATOR,
                "log_format": "json",
                "kv_cache_bytes": 32 << 20,
            }
            sink = stack.enter_context(log.open("wb"))
            command = [sys.executable, "-c", SERVE, json.dumps(fields)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink)
            stack.callback(process.wait)
            stack.callback(process.kill)
        one, other = (stack.enter_context(client(_listening(log), OPERATOR)) for log in logs)
        for each in (one, other):
            until(lambda each=each: each.get("/ready").status_code == 200)  # type: ignore[misc]
        yield one, other


def client(url: str, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=url, headers=headers, timeout=PATIENCE)


def _listening(log: Path) -> str:
    def lines() -> list[str]:
        return [line for line in log.read_text().splitlines() if '"listening"' in line]

    until(lambda: bool(lines()))
    return str(json.loads(lines()[0])["url"])


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> float:
    """How long it took to come true."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + seconds, f"not within {seconds:g} s"
        time.sleep(0.02)
    return time.monotonic() - begun


def upload(server: httpx.Client, name: str, sample: Path) -> dict[str, Any]:
    files = {
        "config": (sample / "adapter_config.json").read_bytes(),
        "weights": (sample / "adapter_model.safetensors").read_bytes(),
    }
    response = server.post("/adapters", data={"name": name}, files=files)
    assert response.status_code == 201, response.text
    found: dict[str, Any] = response.json()
    return found


def ask(server: httpx.Client, adapter: str) -> httpx.Response:
    body = {"inputs": "uryyb", "parameters": {"adapter_id": adapter, "max_new_tokens": 2}}
    return server.post("/generate", json=body)


def test_what_one_server_does_the_other_sees(pair: tuple[httpx.Client, httpx.Client]) -> None:
    one, other = pair
    assert ask(other, "letters").status_code == 404

    # An upload serves on the other, with its first token within a second of the reply.
    uploaded = upload(one, "letters", CIPHER)
    begun = time.monotonic()
    served = ask(other, "letters")
    assert served.status_code == 200, served.text
    assert time.monotonic() - begun < SEEN
    assert served.headers["x-adapter-digest"] == uploaded["digest"]

    # An alias moves there and back while the other answers requests for it: each gets one of the
    # two versions, and the first request after the move gets the new one.
    second = upload(other, "letters", TICKETS)
    digests = {1: uploaded["digest"], 2: second["digest"]}
    assert digests[1] != digests[2]
    _point(one, 1)
    seen: list[tuple[int, str]] = []
    moved = threading.Event()

    def read() -> None:
        while not moved.is_set():
            response = ask(other, "letters@prod")
            seen.append((response.status_code, response.headers.get("x-adapter-digest", "")))

    reading = threading.Thread(target=read)
    reading.start()
    for version in (2, 1, 2, 1, 2):
        time.sleep(0.2)
        _point(one, version)
        assert ask(other, "letters@prod").headers["x-adapter-digest"] == digests[version]
    moved.set()
    reading.join()
    assert {status for status, _ in seen} == {200}
    assert {digest for _, digest in seen} == set(digests.values())

    # A deletion: the other does not serve from its memory what is gone.
    assert one.delete("/adapters/letters@1").status_code == 200
    assert ask(other, "letters@1").status_code == 404
    assert ask(other, "letters@2").status_code == 200

    # A key of one opens the other at once, and is closed there within a second.
    body = {"name": "a key", "tenant": "default", "scopes": ["infer"]}
    made = one.post("/keys", json=body).json()
    with client(str(other.base_url), made["key"]) as holder:
        assert ask(holder, "letters").status_code == 200
        assert one.delete(f"/keys/{made['id']}").status_code == 200
        until(lambda: ask(holder, "letters").status_code == 401, SEEN)
        assert ask(holder, "letters").status_code == 401


def test_both_upload_the_same_name_at_once(pair: tuple[httpx.Client, httpx.Client]) -> None:
    found: list[dict[str, Any]] = []
    sent = [
        threading.Thread(target=lambda s=server, a=sample: found.append(upload(s, "both", a)))  # type: ignore[misc]
        for server, sample in zip(pair, (CIPHER, TICKETS), strict=True)
    ]
    for each in sent:
        each.start()
    for each in sent:
        each.join()
    assert sorted(one["version"] for one in found) == [1, 2]
    for server in pair:
        for manifest in found:
            response = ask(server, f"both@{manifest['version']}")
            assert response.headers["x-adapter-digest"] == manifest["digest"]


def _point(server: httpx.Client, version: int) -> None:
    response = server.put("/adapters/letters/aliases/prod", json={"version": version})
    assert response.status_code == 200, response.text
