"""Connections: slow heads are closed, and there is a bound on how many are open."""

from __future__ import annotations

import asyncio
import json
import resource
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.responses import Response

from service.api import connection as connections
from service.api.connection import Connection
from service.api.sse import EventReply
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


LARGE = b"a" * (8 << 20)
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
    assert b"retry-after" not in head, "the same again is refused again"
    assert json.loads(body)["error_type"] == "validation"


def gone(connection: socket.socket) -> bool:
    """Whether the other side ended the connection, without reading what it sent."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))


@pytest.mark.parametrize("path", ["/large", "/stream"])
def test_who_takes_nothing_is_cut_off(
    running: Running, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(Connection, "stall_seconds", 0.3)
    app, ended = running.app, threading.Event()
    assert isinstance(app, FastAPI)

    @app.get("/large")
    async def large() -> Response:
        return Response(LARGE)

    @app.get("/stream")
    async def stream() -> Response:
        return EventReply(endless(), ended.set, {})

    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(running.address)
        connection.sendall(REQUEST.replace(b"/", path.encode(), 1))
        until(lambda: gone(connection), within=30)
    until(lambda: len(running.server.server_state.tasks) == 0)
    assert path == "/large" or ended.wait(30)


def test_who_takes_little_is_not(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "stall_seconds", 0.2)

    @running.app.get("/large")
    async def large() -> Response:
        return Response(LARGE)

    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(running.address)
        connection.sendall(REQUEST.replace(b"/", b"/large", 1))
        began, taken = time.monotonic(), 0
        while time.monotonic() - began < 0.8:
            taken += len(connection.recv(1 << 15))
            time.sleep(0.01)
        while taken < len(LARGE):
            piece = connection.recv(1 << 20)
            assert piece, "it was cut off"
            taken += len(piece)


async def endless() -> AsyncIterator[Mapping[str, Any]]:
    while True:
        yield {"text": "a" * 100_000}
        await asyncio.sleep(0)


def test_room_for_connections_leaves_files_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, pair: asked.append(pair))
    for limits, wanted, found in (
        ((1024, 20_000), (4608, 20_000), 4096),  # as most systems begin: raised
        ((1024, 2048), (2048, 2048), 1536),
        ((1024, 1024), (1024, 1024), 512),
        ((64, 64), (64, 64), 32),
        ((9000, 9000), None, 4096),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, 4096),
        ((1024, resource.RLIM_INFINITY), (4608, resource.RLIM_INFINITY), 4096),
    ):
        asked.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda what, limits=limits: limits)
        assert connections.room() == found
        assert asked == ([wanted] if wanted else [])
