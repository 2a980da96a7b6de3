"""The door: ids, origins, slow and large bodies, and a log without anybody's text."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from service.api import door
from service.api.door import Bounds, Door
from service.tracing.trace import Untraced
from tests.service.api.conftest import Running, until
from tests.waiting import LOOP_TIME, simulated

CANARY = "canary-of-a-secret-prompt"


def through(bounds: Bounds, app: Any, messages: list[dict[str, Any]], **scope: Any) -> list[Any]:
    """Send one request's messages through a door before `app`; what comes back."""
    sent: list[Any] = []
    coming = iter(messages)

    async def receive() -> dict[str, Any]:
        message = next(coming, None)
        if message is None:
            await asyncio.sleep(3600)
        else:
            await asyncio.sleep(message.get("delay", 0))
        return message  # type: ignore[return-value]

    async def send(message: Any) -> None:
        sent.append(message)

    whole = {
        "type": "http",
        "method": "POST",
        "path": "/x",
        "headers": [(b"transfer-encoding", b"chunked")],
        **scope,
    }
    simulated(Door(app, bounds, Untraced())(whole, receive, send))
    return sent


async def reading(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the body and answers 200."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def piece(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "LINGER_SECONDS", 0.05)
    monkeypatch.setattr(door, "time", LOOP_TIME)


def test_a_slow_body_is_not_waited_for() -> None:
    bounds = Bounds(1000, grace_seconds=0.05, bytes_per_second=1e9)
    sent = through(bounds, reading, [piece(b"a"), piece(b"b")])
    assert sent[0]["status"] == 408
    assert b"2 bytes" in sent[1]["body"]
    assert (b"connection", b"close") in sent[0]["headers"]


def test_a_large_body_may_take_its_time() -> None:
    """The deadline grows with what has arrived."""
    bounds = Bounds(1000, grace_seconds=0.05, bytes_per_second=10)
    late = {**piece(b"b", more=False), "delay": 0.2}
    assert through(bounds, reading, [piece(b"x" * 100), late])[0]["status"] == 200
    assert through(bounds, reading, [piece(b""), late])[0]["status"] == 408


def test_speed_buys_no_silence() -> None:
    """What came fast would pay for a deadline in hours."""
    bounds = Bounds(10_000, silence_seconds=0.05, bytes_per_second=10)
    late = {**piece(b"b", more=False), "delay": 0.2}
    assert through(bounds, reading, [piece(b"x" * 9000), late])[0]["status"] == 408
    assert through(bounds, reading, [piece(b"x" * 9000), piece(b"b", False)])[0]["status"] == 200


def test_a_small_body_that_nobody_reads_ends_no_connection() -> None:
    async def refusing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    def refused(length: int, *messages: dict[str, Any]) -> Any:
        headers = [(b"content-length", str(length).encode())]
        return through(Bounds(1 << 20), refusing, list(messages), headers=headers)[0]["headers"]

    assert (b"connection", b"close") not in refused(2, piece(b"ab", more=False))
    assert (b"connection", b"close") in refused(2, piece(b"a"))
    assert (b"connection", b"close") in refused(1 << 19, piece(b"ab", more=False))


@pytest.mark.parametrize("swallow", [True, False])
def test_a_refusal_is_the_answer_whatever_the_route_makes_of_it(swallow: bool) -> None:
    async def stubborn(scope: Any, receive: Any, send: Any) -> None:
        try:
            await reading(scope, receive, send)
        except Exception:
            if not swallow:
                raise
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"odd"})

    sent = through(Bounds(3), stubborn, [piece(b"abcd"), piece(b"", more=False)])
    assert sent[0]["status"] == 413
    assert b"at most 3 bytes" in sent[1]["body"]


def test_cap_by_route() -> None:
    bounds = Bounds(3, by_route={("POST", "/big"): 10})
    body = [piece(b"abcd", more=False)]
    assert through(bounds, reading, body, path="/big")[0]["status"] == 200
    assert through(bounds, reading, body, path="/x")[0]["status"] == 413
    assert through(bounds, reading, body, path="/big", method="PUT")[0]["status"] == 413


@pytest.mark.parametrize(
    ("method", "origin", "status"),
    [
        ("POST", b"http://evil.example", 403),
        ("POST", b"null", 403),
        ("POST", b"http://[::1", 403),
        ("DELETE", b"http://here.example:81", 403),
        ("POST", b"http://here.example", 200),
        ("GET", b"http://evil.example", 200),
    ],
)
def test_foreign_pages_cannot_write(method: str, origin: bytes, status: int) -> None:
    headers = [(b"origin", origin), (b"host", b"here.example")]
    sent = through(Bounds(9), reading, [piece(b"", more=False)], method=method, headers=headers)
    assert sent[0]["status"] == status


def test_an_error_after_the_first_byte_cuts_the_connection() -> None:
    async def breaking(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError(CANARY)

    with pytest.raises(RuntimeError):
        through(Bounds(9), breaking, [piece(b"", more=False)])


def test_an_error_before_it_is_an_envelope() -> None:
    async def breaking(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError(CANARY)

    with capture_logs() as logs:
        sent = through(Bounds(9), breaking, [piece(b"", more=False)])
    assert sent[0]["status"] == 500
    assert b"internal" in sent[1]["body"]
    assert CANARY.encode() not in sent[1]["body"]
    assert CANARY not in str(logs)
    assert logs[0]["kind"] == "RuntimeError"
    assert any("breaking" in frame for frame in logs[0]["frames"])


def test_request_id_is_the_server_s_own(client: httpx.Client) -> None:
    theirs = {"x-request-id": "theirs"}
    ids = {client.get("/health", headers=theirs).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in ids)


def test_log_has_the_request_and_no_text_of_it(
    client: httpx.Client, server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    server.settle()  # another test's line may not have been written yet
    parameters = {"max_new_tokens": 2, "adapter_id": "lora"}
    theirs = {"x-request-id": "a\tb" + "c" * 99}
    with capture_logs() as logs:
        for inputs in (CANARY, [{"role": "user", "content": CANARY}], {"bad": CANARY}):
            body = {"inputs": inputs, "parameters": parameters}
            client.post(f"/generate?{CANARY}", json=body, headers=theirs)
        broken = '{"inputs": "' + CANARY
        client.post("/generate", content=broken, headers={"content-type": "application/json"})
        # A line may be written a moment after its reply was read.
        until(lambda: sum(line["event"] == "request" for line in logs) == 4)
    assert CANARY not in str(logs)
    assert CANARY not in caplog.text
    assert [line["status"] for line in logs] == [200, 200, 422, 422]
    assert {line["path"] for line in logs} == {"/generate"}
    assert logs[0]["client_request_id"] == "a?b" + "c" * 61


def test_a_request_head_that_is_too_large(server: Running) -> None:
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nx-a: " + b"a" * 70_000)
        reply = connection.recv(4096)
    assert reply.startswith(b"HTTP/1.1 4")
