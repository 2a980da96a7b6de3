"""Connections: slow heads are closed, and there is a bound on how many are open."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from fastapi import FastAPI

from service.api.connection import Connection
from tests.service.api.conftest import Running, until


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(Connection, "head_seconds", 0.2)
    app = FastAPI()

    @app.get("/")
    async def here() -> str:
        return "here"

    found = Running(app, max_open=3)
    yield found
    found.stop()


def dial(running: Running) -> socket.socket:
    return socket.create_connection(running.address, timeout=60)


REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nx-a: 1"])
def test_a_head_that_never_ends_is_closed(running: Running, start: bytes) -> None:
    with dial(running) as connection:
        connection.sendall(start)
        assert connection.recv(100) == b""


def test_bytes_do_not_buy_time(running: Running) -> None:
    """The deadline is for the whole head, not from byte to byte."""
    with dial(running) as connection:
        sent = 0
        try:
            connection.sendall(b"GET / HTTP/1.1\r\n")
            for _ in range(2000):
                connection.sendall(b"a")
                sent += 1
                connection.settimeout(0.01)
                try:
                    if connection.recv(1) == b"":
                        break
                except TimeoutError:
                    connection.settimeout(60)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 2000


def test_a_second_request_has_its_own_deadline(running: Running) -> None:
    with dial(running) as connection:
        for _ in range(3):
            connection.sendall(REQUEST)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET / HT")
        assert connection.recv(100) == b""


def test_too_many_connections_are_told_so(running: Running) -> None:
    held = [dial(running) for _ in range(3)]
    until(lambda: len(running.server.server_state.connections) == 3)
    with dial(running) as connection:
        reply = connection.recv(4096)
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5" in reply
    for one in held:
        one.close()
    until(lambda: len(running.server.server_state.connections) == 0)
    with dial(running) as connection:
        connection.sendall(REQUEST)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "bad", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\r\n\r\n"]
)
def test_what_is_no_request_gets_the_envelope(running: Running, bad: bytes) -> None:
    with dial(running) as connection:
        connection.sendall(bad)
        reply = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error_type"] == "validation"
