"""Behind the filter: a connection comes with its first request, or it is told why not, or closed;
and what the event loop reads is what the client sent."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop
from fastapi import FastAPI, Request

from service.api.connection import Connection, connection_class
from service.api.door import Bounds
from service.net import build, library
from service.net.filter import Come, Filter
from service.net.library import Counts, Library, Rules
from service.net.listening import Listening, rules
from tests.service.api.conftest import PATIENCE, Running, until

HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\n"
WHOLE = b"GET /here HTTP/1.1\r\nHost: x\r\n\r\n"
HASTY = Bounds(1 << 20, grace_seconds=0.4, silence_seconds=0.3)
PATIENT = Bounds(1 << 20, grace_seconds=PATIENCE, silence_seconds=PATIENCE)


@pytest.fixture(scope="module")
def native() -> Library:
    found, why = library.load()
    if found is None:
        pytest.skip(why)
    return found


Serve = Callable[..., Running]


@pytest.fixture
def serve(native: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """A server of so much patience; `/slow` waits for `app.state.go`."""
    app, made = FastAPI(), list[Running]()
    app.state.go = threading.Event()

    @app.get("/here")
    async def here() -> str:
        return "here"

    @app.post("/echo")
    async def echo(request: Request) -> str:
        return (await request.body()).decode()

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.to_thread(app.state.go.wait, PATIENCE)
        return "slow"

    def start(bounds: Bounds, head_seconds: float) -> Running:
        monkeypatch.setattr(Connection, "head_seconds", head_seconds)
        made.append(Running(app, max_open=3, bounds=bounds))
        assert counts(made[0]) is not Connection.counts, "there is no filter"
        return made[0]

    yield start
    app.state.go.set()
    for one in made:
        one.stop()


@pytest.fixture
def running(serve: Serve) -> Running:
    """It waits for whoever is slow: this machine may be."""
    return serve(PATIENT, PATIENCE)


@pytest.fixture
def hasty(serve: Serve) -> Running:
    return serve(HASTY, 0.4)


def counts(running: Running) -> Counts:
    http: Any = running.server.config.http
    found: Counts = http.counts
    return found


def dial(running: Running) -> socket.socket:
    return socket.create_connection(running.address, timeout=PATIENCE)


def heard(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(4096), b""))


def hears(connection: socket.socket, what: bytes) -> bool:
    """Whether this comes. A reply comes in pieces."""
    came = b""
    while what not in came and (piece := connection.recv(4096)):
        came += piece
    return what in came


def inside(running: Running) -> int:
    return len(running.server.server_state.connections)


# What comes is what was sent ---------------------------------------------------------------------


class Recorded(asyncio.Protocol):
    def __init__(self, come: Come, ended: Callable[[bytes], None]) -> None:
        self.content = come.content
        self.ended = ended

    def data_received(self, data: bytes) -> None:
        self.content += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended(self.content)


def pieces(chance: random.Random, content: bytes) -> list[bytes]:
    cuts = sorted({0, len(content), *chance.choices(range(len(content)), k=chance.randrange(5))})
    return [content[start:end] for start, end in pairwise(cuts)]


def requests(chance: random.Random) -> Iterator[bytes]:
    """Each complete in some way, or no request at all."""
    body = chance.randbytes(5)
    length = b"content-length: 5\r\n"
    large = b"%scontent-length: %d\r\n\r\n" % (HEAD, 300_000) + bytes(300_000)
    yield from (WHOLE, WHOLE + WHOLE + HEAD, HEAD + length + b"\r\n" + body + WHOLE, large)
    yield from (HEAD + length + length + b"\r\n", b"\r\n\r\n", b"a", WHOLE.replace(b"\r\n", b"\n"))
    yield from (b"\x16\x03\x01\x02", b"GET\r\n", HEAD + b" a: b\r\n", HEAD + b"a b: c\r\n")
    yield from (HEAD + b"x: " + b"a" * 20_000, HEAD + b"Transfer-Encoding: chunked\r\n\r\n5")
    yield from (HEAD + b"Expect: 100-continue\r\n\r\n", chance.randbytes(100))


@pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_any_bytes_in_any_pieces(
    native: Library, factory: Any, family: socket.AddressFamily, tmp_path: Path
) -> None:
    chance, found = random.Random(7), []
    sent = [content for _ in range(3) for content in requests(chance)]
    config = uvicorn.Config("x", http=Connection, log_config=None)  # logging is everybody's

    async def send(address: Any, content: bytes) -> None:
        with socket.socket(family) as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, address)
            for piece in pieces(chance, content):
                await loop.sock_sendall(client, piece)
                await asyncio.sleep(0)
            client.shutdown(socket.SHUT_WR)
            assert await loop.sock_recv(client, 10) == b""

    async def serve() -> None:
        with socket.socket(family) as listener:
            own: Any = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0)}
            listener.bind(own.get(family, str(tmp_path / "socket")))
            listener.listen()
            address = listener.getsockname()
            listener.setblocking(False)
            own_rules = rules(config, Connection, "0" * 10)
            made = Filter(native, own_rules, Counts(), [listener.detach()])
        made.deliver(lambda come: Recorded(come, found.append))
        for content in sent:
            await send(address, content)
        await made.stop()
        await made.end()
        assert (made.counts.held, made.counts.bytes) == (0, 0)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve())
    assert found == sent


# Requests ----------------------------------------------------------------------------------------


def test_a_request_is_handed_over_when_it_is_whole(running: Running) -> None:
    with dial(running) as connection:
        until(lambda: counts(running).held == 1)
        for piece in (HEAD[:10], HEAD[10:] + b"Content-Le", b"ngth: 6\r\n\r", b"\nabc"):
            connection.sendall(piece)
            time.sleep(0.02)
            assert (counts(running).held, inside(running)) == (1, 0)
        connection.sendall(b"def" + WHOLE)
        reply = b""
        while b'"here"' not in reply:
            reply += connection.recv(4096)
        assert b'"abcdef"' in reply
        assert (counts(running).held, counts(running).open, inside(running)) == (0, 1, 1)
        connection.sendall(HEAD + b"Content-Length: 2\r\n\r\nab")
        assert hears(connection, b'"ab"')
    until(lambda: counts(running).open == 0)


def test_what_is_no_request_is_refused_at_once(running: Running) -> None:
    with dial(running) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("start", [b"", b"GET /", HEAD + b"x: y\r\nz: "])
def test_a_head_that_never_ends_is_closed(hasty: Running, start: bytes) -> None:
    began = time.monotonic()
    with dial(hasty) as connection:
        connection.sendall(start)
        assert heard(connection) == b""
        assert time.monotonic() - began > 0.3
    until(lambda: counts(hasty).held == 0)
    assert (counts(hasty).closed, inside(hasty)) == (1, 0)


def test_what_the_filter_waited_counts(serve: Serve) -> None:
    """Who sends something strange at last has no second deadline."""
    with dial(serve(PATIENT, 3.0)) as connection:
        time.sleep(2.0)
        began = time.monotonic()
        connection.sendall(b"\r\n")
        assert heard(connection) == b""
        assert time.monotonic() - began < 2.5, "of three seconds one was left"


@pytest.mark.parametrize("path", [b"/echo", b"/v1/files"])
def test_a_body_that_does_not_come_is_refused(
    hasty: Running, path: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with dial(hasty) as connection:
        connection.sendall(HEAD.replace(b"/echo", path) + b"Content-Length: 6\r\n\r\nab")
        came = heard(connection)
        connection.sendall(b"cdef")  # nobody minds
    head, _, body = came.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"\r\nconnection: close\r\n" in head
    told = json.loads(body)
    assert re.search(r" \d+\.\d seconds", str(told["error"]))
    assert isinstance(told["error"], dict) == path.startswith(b"/v1/")
    (date,) = (line[6:] for line in head.split(b"\r\n") if line.startswith(b"date: "))
    assert abs(time.time() - time.mktime(time.strptime(date.decode(), DATE)) + time.timezone) < 60
    (number,) = (line[14:] for line in head.split(b"\r\n") if line.startswith(b"x-request-id: "))
    assert number.endswith(b"000001")
    assert len(number) == 16
    assert counts(hasty).late == 1
    until(lambda: number.decode() in capsys.readouterr().out)


DATE = "%a, %d %b %Y %H:%M:%S GMT"


def test_a_fast_body_buys_time_and_silence_costs_it(serve: Serve) -> None:
    """100,000 bytes are worth six seconds; the silence after them is not borne as long."""
    bounds = Bounds(1 << 20, grace_seconds=0.4, silence_seconds=1.5)
    with dial(serve(bounds, PATIENCE)) as connection:
        connection.sendall(HEAD + b"Content-Length: 200000\r\n\r\n" + b"a" * 100_000)
        for _ in range(4):
            time.sleep(0.15)
            began = time.monotonic()
            connection.sendall(b"a" * 1000)
        assert heard(connection).startswith(b"HTTP/1.1 408")
        assert 1.4 < time.monotonic() - began < 5


def test_the_filter_counts_those_inside(running: Running) -> None:
    with dial(running) as first, dial(running) as second, dial(running) as third:
        first.sendall(WHOLE)
        assert hears(first, b"here")
        second.sendall(b"GET")
        third.sendall(b"GET")
        until(lambda: counts(running).held == 2)
        with dial(running) as fourth:
            assert b"too many connections" in heard(fourth)
        second.sendall(WHOLE[3:])
        assert hears(second, b"here"), "who was here before is no fourth"
    until(lambda: (counts(running).held, counts(running).open) == (0, 0))
    with dial(running) as connection:
        connection.sendall(WHOLE)
        assert hears(connection, b"here")


def test_nobody_reads_ahead_of_a_reply_without_end(running: Running) -> None:
    """Reading is paused for the second request, which came with the connection."""
    with dial(running) as connection:
        chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n4000000\r\n"
        connection.sendall(WHOLE.replace(b"/here", b"/slow") + chunked)
        connection.settimeout(0.3)
        sent = 0
        try:
            while sent < 64 << 20:
                sent += connection.send(bytes(1 << 16))
        except TimeoutError:
            pass
    assert sent < 32 << 20


# The end -----------------------------------------------------------------------------------------


def test_who_waits_when_the_server_stops(running: Running) -> None:
    app: Any = running.app
    with dial(running) as body, dial(running) as head, dial(running) as slow:
        body.sendall(HEAD + b"Content-Length: 6\r\n\r\nab")
        head.sendall(b"GET / HT")
        until(lambda: counts(running).held == 3)
        slow.sendall(WHOLE.replace(b"/here", b"/slow"))
        until(lambda: inside(running) == 1)
        running.server.should_exit = True
        told = heard(body)
        assert heard(head) == b""
        app.state.go.set()
        assert b'"slow"' in heard(slow)
    assert told.startswith(b"HTTP/1.1 503 ")
    assert b"connection: close" in told
    running.thread.join(PATIENCE)
    with pytest.raises(ConnectionRefusedError):
        dial(running)


def test_a_port_that_is_taken_ends_the_server(native: Library) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = uvicorn.Config(
            FastAPI(), port=taken.getsockname()[1], http=connection_class(1), log_config=None
        )
        with pytest.raises(SystemExit):
            Listening(config).run()


@pytest.mark.slow
def test_without_descriptors_it_waits_for_some(native: Library) -> None:
    """And says so; who is held is served meanwhile, and others when there is room again."""
    program = Path(__file__).with_name("starving.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(program.parents[3])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no descriptor is left" in done.stdout


# The library -------------------------------------------------------------------------------------


def test_without_a_library_the_event_loop_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, why = library.load(tmp_path)
    assert found is None
    assert "service.net.build" in why
    monkeypatch.setattr("service.net.listening.load", lambda: (None, why))
    app = FastAPI()
    running = Running(app)
    with dial(running) as connection:
        connection.sendall(b"GET /")
        until(lambda: inside(running) == 1)
    running.stop()


def test_the_library_says_why_it_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / library.LIBRARY).write_bytes(b"no library")
    assert library.load(tmp_path)[1].startswith("not loaded")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert build.build(tmp_path) is None
    assert "no C compiler" in library.load(tmp_path)[1]
    monkeypatch.setenv("NIBBLE_NATIVE", "0")
    assert library.load()[1] == "off: NIBBLE_NATIVE=0"


def test_a_filter_that_cannot_begin_says_why(native: Library) -> None:
    rule = Rules(late=library.Reply(bytes(5000), 5000))
    with pytest.raises(OSError, match="long"):
        Filter(native, rule, Counts(), [])
