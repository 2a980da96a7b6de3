"""Servers over one catalog and one set of blobs, each a process with a home of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

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


@contextmanager
def running(at: Path, catalog: str, blobs: str, count: int = 2) -> Iterator[list[httpx.Client]]:
    """All start at once. Homes and logs lie in `at`."""
    with ExitStack() as stack:
        logs = [at / f"log-{number}" for number in range(count)]
        for number, log in enumerate(logs):
            fields = {
                "home": str(at / f"home-{number}"),
                "blobs": blobs,
                "catalog": catalog,
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
        found = [stack.enter_context(client(_listening(log), OPERATOR)) for log in logs]
        for each in found:
            until(lambda each=each: each.get("/ready").status_code == 200)  # type: ignore[misc]
        yield found


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
