"""A full server refuses before a request costs it anything, in the words that the routes have."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from service.admission import Admission
from service.api import generate, shedding
from service.api.openai import chat
from service.api.shedding import Shedder
from tests.service.api.conftest import Running, until

ROUTES = [*generate.router.routes, *chat.router.routes]
BODY = {"inputs": "a question", "parameters": {"max_new_tokens": 1}}


@pytest.fixture
def full(server: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.setattr(server.desk.admission, "max_queue", 0)
    return server


def scope(path: str, method: str = "POST") -> dict[str, Any]:
    return {"method": method, "path": path}


def ask(*scopes: dict[str, Any]) -> Any:
    async def asking() -> Any:
        admission = Admission(0)
        admission.open(lambda: 0)
        shedder = Shedder(admission, ROUTES)
        return [shedder.refusal(one) for one in scopes]

    return asyncio.run(asking())


def test_only_what_queues_is_refused_here() -> None:
    asked = [("/generate", "POST"), ("/v1/chat/completions", "POST"), ("/generate", "GET")]
    asked += [("/health", "GET"), ("/adapters", "POST"), ("/generate/", "POST")]
    found = ask(*(scope(*one) for one in asked))
    assert [one is not None for one in found] == [True, True, False, False, False, False]


def test_who_has_room_is_not_refused() -> None:
    admission = Admission(1)
    admission.open(lambda: 0)
    assert Shedder(admission, ROUTES).refusal(scope("/generate")) is None
    assert Shedder().refusal(scope("/generate")) is None


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/chat/completions"])
@pytest.mark.parametrize("state", ["ready", "draining"])
def test_the_words_and_headers_are_those_of_the_routes(
    client: httpx.Client, full: Running, monkeypatch: pytest.MonkeyPatch, path: str, state: str
) -> None:
    monkeypatch.setattr(full.desk.admission, "state", state)
    early = client.post(path, json=BODY)
    # More than a connection holds back goes the long way.
    late = client.post(path, content=b"a" * 100_000, headers={"content-type": "application/json"})
    assert early.status_code == late.status_code == 503
    one, other = (
        re.sub(r'(request_id":")[0-9a-f]{16}"', r'\1"', reply.text) for reply in (early, late)
    )
    assert one == other
    assert set(late.headers) - set(early.headers) == {"connection"}
    same = ("retry-after", "content-type", "x-content-type-options")
    assert [early.headers[name] for name in same] == [late.headers[name] for name in same]
    assert re.fullmatch("[0-9a-f]{16}", early.headers["x-request-id"])
    assert path.startswith("/v1/") or early.json()["request_id"] == early.headers["x-request-id"]


def test_the_connection_lives_on(full: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps(BODY).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n" % len(content)
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(full.address, timeout=60) as connection:
        connection.sendall((head + b"\r\n" + content) * 3 + health)
        came = b""
        while came.count(b"HTTP/1.1") < 4 or not came.endswith(b"}"):
            came += connection.recv(1 << 16)
        statuses = re.findall(rb"HTTP/1.1 (\d+)", came)
        assert statuses == [b"503", b"503", b"503", b"200"]
        monkeypatch.undo()
        connection.sendall(head + b"Connection: close\r\n\r\n" + content)
        came = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert came.startswith(b"HTTP/1.1 200")


def test_who_wants_no_further_reply_gets_none(full: Running) -> None:
    for head in (b"POST /generate HTTP/1.0\r\n", b"POST / HTTP/1.1\r\nConnection: close\r\n"):
        with socket.create_connection(full.address, timeout=60) as connection:
            connection.sendall(head + b"Host: localhost\r\nContent-Length: 2\r\n\r\n{}")
            came = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert came.startswith(b"HTTP/1.1 503")
        assert b"\r\nconnection: close\r\n" in came


def test_each_is_counted_and_a_second_has_one_line(
    client: httpx.Client, full: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shedding, "LINE_SECONDS", 0.1)

    def counted() -> float:
        text = client.get("/metrics").text
        found = re.search(r'nibble:requests_refused_total\{.*reason="overloaded"\} (\S+)', text)
        return float(found[1]) if found else -1.0

    before = counted()
    begun = time.monotonic()
    with capture_logs() as logs:
        ids = [client.post("/generate", json=BODY).headers["x-request-id"] for _ in range(20)]
        # A line of the test before may not have been written yet, and takes some of these.
        until(lambda: sum(line.get("503 overloaded", 0) for line in logs) >= 20)
        until(lambda: any(line.get("last") == ids[-1] for line in logs))
    assert counted() - before == 20
    told = [line for line in logs if line["event"] == "requests refused"]
    assert len(told) < 2 + (time.monotonic() - begun) / 0.1
    assert not any(line["event"] == "request" and line["status"] == 503 for line in logs)
    for one in ids:
        assert any(line["first"] <= one <= line["last"] for line in told)
