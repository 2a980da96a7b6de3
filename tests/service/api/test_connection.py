"""Connections: slow heads are closed, and there is a bound on how many are open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, ClassVar

import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from service.api import connection as connections
from service.api.connection import Connection, Room
from service.api.door import Bounds
from service.api.sse import EventReply
from tests.service.api.conftest import PATIENCE, Running, until


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(Connection, "head_seconds", PATIENCE)
    app = FastAPI()

    @app.get("/")
    async def here() -> str:
        return "here"

    found = Running(app, max_open=3, filtered=False)
    yield found
    found.stop()


def dial(running: Running) -> socket.socket:
    return socket.create_connection(running.address, timeout=PATIENCE)


def whole(connection: socket.socket) -> bytes:
    """One reply: its head and its body may come in pieces."""
    came = b""
    while b"\r\n\r\n" not in came:
        came += _more(connection)
    size = int(re.findall(rb"content-length: (\d+)", came)[0])
    while len(came.partition(b"\r\n\r\n")[2]) < size:
        came += _more(connection)
    return came


def _more(connection: socket.socket) -> bytes:
    piece = connection.recv(1 << 16)
    assert piece, "it was closed"
    return piece


def open_at(running: Running) -> list[Any]:
    """Its connections: a copy, for the set of them changes in another thread."""
    return list(running.server.server_state.connections)


def patient(received: int, **pace: float) -> Bounds:
    """Bounds whose clock stands until so many bytes of a body are there, however long the machine
    took over them."""

    class Patient(Bounds):
        def left(self, came: int, seconds: float, silent: float) -> float:
            if came < received:
                return connections.LOOK_SECONDS
            return super().left(came, seconds, silent)

    return Patient(1 << 20, **pace)


LARGE = b"a" * (8 << 20)
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nx-a: 1"])
def test_a_head_that_never_ends_is_closed(
    running: Running, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.2)
    with dial(running) as connection:
        connection.sendall(start)
        assert connection.recv(100) == b""


def test_bytes_do_not_buy_time(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is for the whole head, not from byte to byte."""
    monkeypatch.setattr(Connection, "head_seconds", 0.2)
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
                    connection.settimeout(PATIENCE)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 2000


def test_a_second_request_has_its_own_deadline(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dial(running) as connection:
        for _ in range(3):
            connection.sendall(REQUEST)
            assert whole(connection).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(Connection, "head_seconds", 0.2)
        connection.sendall(b"GET / HT")
        assert connection.recv(100) == b""


def test_too_many_connections_are_told_so(running: Running) -> None:
    held = [dial(running) for _ in range(3)]
    until(lambda: len(open_at(running)) == 3)
    with dial(running) as connection:
        reply = connection.recv(4096)
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5" in reply
    for one in held:
        one.close()
    until(lambda: len(open_at(running)) == 0)
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
        until(lambda: gone(connection))
    until(lambda: len(running.server.server_state.tasks) == 0)
    assert path == "/large" or ended.wait(PATIENCE)


def test_who_takes_nothing_has_little_made(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Of many replies that he asked for at once; what is begun when he leaves is told so."""
    made: list[int] = []

    @running.app.get("/one")
    async def one() -> Response:
        made.append(1)
        return Response(LARGE[: connections.UNSENT_BYTES])

    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(running.address)
        connection.sendall(REQUEST.replace(b"/", b"/one", 1) * 60)
        until(lambda: len(made) > 2)
        time.sleep(0.2)
        assert len(made) < 10
        connection.close()
        until(lambda: len(running.server.server_state.tasks) == 0)
    assert not caplog.records, "his going is no failure"


def test_who_leaves_ends_what_runs_for_him(running: Running) -> None:
    """Though another request of his waits behind it."""
    began, ended = threading.Event(), threading.Event()

    @running.app.get("/wait")
    async def wait(request: Request) -> None:
        began.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ended.set()

    with dial(running) as connection:
        connection.sendall(REQUEST.replace(b"/", b"/wait", 1) * 2)
        assert began.wait(PATIENCE)
    assert ended.wait(PATIENCE)
    until(lambda: len(running.server.server_state.tasks) == 0)


def test_who_takes_little_is_not(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "stall_seconds", 2.0)  # this thread may have to wait too

    @running.app.get("/large")
    async def large() -> Response:
        return Response(LARGE)

    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(running.address)
        connection.sendall(REQUEST.replace(b"/", b"/large", 1))
        began, taken = time.monotonic(), 0
        while time.monotonic() - began < 2.5:
            taken += len(connection.recv(1 << 15))
            time.sleep(0.02)
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


# What came as a request -----------------------------------------------------------------------


@pytest.fixture
def echoing() -> Iterator[Running]:
    """An application that says what it understood; each reply is one line of JSON."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        names = [name.decode() for name, _ in scope["headers"]]
        told = json.dumps([scope["method"], scope["path"], names, body.decode()]).encode()
        length = str(len(told)).encode()
        head = {"status": 200, "headers": [(b"content-length", length)]}
        await send({"type": "http.response.start", **head})
        await send({"type": "http.response.body", "body": told})

    found = Running(app, filtered=False)  # type: ignore[arg-type]
    yield found
    found.stop()


LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def replies(running: Running, *pieces: bytes) -> list[tuple[int, Any]]:
    """Everything that the server says to these bytes: until it closes, which it does at the latest
    when it is asked for that, behind them."""
    came = b""
    with dial(running) as connection:
        closed = contextlib.suppress(ConnectionError)  # before it read all
        with closed:
            for piece in (*pieces, LAST):
                connection.sendall(piece)
                time.sleep(0.01 * (len(pieces) > 1))
        with closed:
            while piece := connection.recv(1 << 16):
                came += piece
    found: list[tuple[int, Any]] = []
    while came:
        head, _, came = came.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        size = int(length[1]) if length else 0
        found.append((int(head.split()[1]), json.loads(came[:size]) if size else None))
        came = came[size:]
    if found and found[-1] == (200, ["GET", "/last", ["host", "connection"], ""]):
        found.pop()
    return found


HEAD = b"POST /a HTTP/1.1\r\nHost: x\r\n"
SECOND = b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    "bad",
    [
        b"POST /a HTTP/1.1\r\nContent-Length: 0\r\n\r\n",  # no host
        HEAD + b"Host: y\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"Content-Length: 2, 2\r\n\r\nab",
        HEAD + b"Content-Length: +2\r\n\r\nab",
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"Content-Length: 2\r\n\r\n0\r\n\r\n",
        CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"X : a\r\n\r\n",
        HEAD + b"X: a\r\n b\r\n\r\n",
        HEAD + b"X: a\nY: b\r\n\r\n",
        HEAD + b"X: a\x00b\r\n\r\n",
        CHUNKED + b"\r\n0x2\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"\r\n2\r\nabXX0\r\n\r\n",
        CHUNKED + b"\r\n2\nab\r\n0\r\n\r\n",
        b"GET http://y/a HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /a HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET /a\r\n\r\n",
    ],
)
def test_what_two_readers_could_take_differently_is_refused(echoing: Running, bad: bytes) -> None:
    """And nothing of it, nor what follows, is taken for another request."""
    said = replies(echoing, bad + SECOND)
    assert len([status for status, _ in said if status == 200]) == 0
    assert len(said) <= 1
    assert all(status in (400, 505) and "request_id" in told for status, told in said)


def test_a_head_is_bounded_whole_or_in_pieces(echoing: Running) -> None:
    long = [b"X%d: %s\r\n" % (n, b"a" * 990) for n in range(20)]
    # In both, more comes after what is refused: the refusal is heard nevertheless.
    for pieces in ([HEAD + b"".join(long) + b"\r\n"], [HEAD, *long, b"\r\n"]):
        ((status, told),) = replies(echoing, *pieces)
        assert status == 431
        assert str(connections.HEAD_BYTES) in told["error"]
    ((status, _),) = replies(echoing, HEAD, *long[:15], b"\r\n")
    assert status == 200


@pytest.mark.parametrize(("path", "own"), [(b"/v1/models/", False), (b"/adapters/", True)])
def test_a_name_too_long_for_a_head_is_refused_in_its_routes_words(
    echoing: Running, path: bytes, own: bool
) -> None:
    line = b"GET " + path + b"%C3%A3" * 4000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    ((status, told),) = replies(echoing, line)
    assert status == 431
    said = told if own else told["error"]
    assert said["error" if own else "message"].startswith("no HTTP request: a request's head")


@pytest.mark.parametrize("endless", [b"0\r\n" + b"T: t\r\n" * 9000, b"1;" + b"a" * 40_000])
def test_trailers_and_extensions_are_bounded(echoing: Running, endless: bytes) -> None:
    with dial(echoing) as connection:
        connection.sendall(CHUNKED + b"\r\n")
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(endless), 4000):
                connection.sendall(endless[start : start + 4000])
                time.sleep(0.002)
            assert connection.recv(100) == b""


def test_trailers_are_no_headers(echoing: Running) -> None:
    trailers = b"\r\n2\r\nab\r\n0\r\nAuthorization: Bearer x\r\nExpect: 100-continue\r\n\r\n"
    (first, second) = replies(echoing, CHUNKED + trailers + SECOND)
    assert first == (200, ["POST", "/a", ["host", "transfer-encoding"], "ab"])
    assert second[1][1] == "/b"


def test_a_wish_for_another_protocol_is_not_granted(echoing: Running) -> None:
    """As Java's client asks with its first request; the body is the request's all the same."""
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAM\r\n"
    post = HEAD + wish + b"Content-Length: 30\r\n\r\n" + b"GET /smuggled HTTP/1.1\r\n\r\nabcd"
    for pieces in ([post + SECOND], [post[:20], post[20:90], post[90:], SECOND]):
        (first, second) = replies(echoing, *pieces)
        assert (first[1][:2], first[1][3]) == (["POST", "/a"], post[-30:].decode())
        assert "upgrade" not in first[1][2]
        assert second[1][1] == "/b"


def test_a_whole_url_of_this_host_is_taken(echoing: Running) -> None:
    ((status, told),) = replies(echoing, b"GET http://X:81/a?b HTTP/1.1\r\nHost: x:81\r\n\r\n")
    assert (status, told[1]) == (200, "/a")


def test_requests_ahead_of_their_replies_are_answered_in_order(echoing: Running) -> None:
    asked = [b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(100)]
    said = replies(echoing, b"".join(asked))
    assert [told[1] for _, told in said] == [f"/{number}" for number in range(100)]


def test_as_many_are_not_kept(echoing: Running) -> None:
    """Each would be an object or two, and a piece of a quarter megabyte has thousands."""
    came = b""
    with dial(echoing) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(SECOND * 5000)
        while piece := connection.recv(1 << 16):
            came += piece
    assert came.count(b"HTTP/1.1 200") <= connections.PIPELINED


def test_a_body_is_asked_for_when_it_is_wanted(echoing: Running) -> None:
    with dial(echoing) as connection:
        connection.sendall(HEAD + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"ab")
        assert b'"ab"]' in whole(connection)


def test_a_small_body_begins_no_request_until_it_is_there(echoing: Running) -> None:
    with dial(echoing) as connection:
        connection.sendall(SECOND + HEAD + b"Content-Length: 6\r\n\r\nab")
        assert b'"/b"' in whole(connection)
        until(lambda: len(echoing.server.server_state.tasks) == 0)
        for number, piece in enumerate((b"c", b"d", b"e"), 3):
            connection.sendall(piece)
            until(lambda number=number: received(echoing) == number)  # type: ignore[misc]
            assert len(echoing.server.server_state.tasks) == 0
        connection.sendall(b"f" + SECOND)
        assert b'"abcdef"]' in whole(connection)


def received(running: Running) -> int:
    """Bytes of the bodies that are held back."""
    held = [one._held for one in open_at(running)]
    return sum(len(each[0].body) for each in held if each)


@pytest.fixture
def roomy(echoing: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """With a place for one body of 200,000 bytes, and for no second one."""
    monkeypatch.setattr(Connection, "bounds", Bounds(1 << 20))
    monkeypatch.setattr(echoing.server.config.http, "shared", Room(300_000))
    return echoing


def begin(connection: socket.socket, declared: bytes) -> None:
    connection.sendall(HEAD + declared + b"\r\n\r\n" + b"a" * 100_000)


def test_a_larger_body_is_held_while_there_is_room_for_it(roomy: Running) -> None:
    tasks = roomy.server.server_state.tasks
    with dial(roomy) as first, dial(roomy) as second:
        begin(first, b"Content-Length: 200000")
        until(lambda: any(one._borrowed for one in open_at(roomy)))
        begin(second, b"Content-Length: 200000")
        until(lambda: len(tasks) == 1)  # no room for the second
        first.sendall(b"a" * 100_000)
        assert whole(first).startswith(b"HTTP/1.1 200")
        begin(first, b"Content-Length: 200000")  # and there is room again
        until(lambda: any(one._borrowed for one in open_at(roomy)))
        until(lambda: len(tasks) == 1)
        second.sendall(b"a" * 100_000)
        assert whole(second).startswith(b"HTTP/1.1 200")
    until(lambda: not open_at(roomy))
    own: Any = roomy.server.config.http
    assert own.shared.take(300_000), "who left gave back what he held"


@pytest.mark.parametrize("declared", [b"Content-Length: 1048577", b"Transfer-Encoding: chunked"])
def test_a_large_body_begins_before_it_is_there(roomy: Running, declared: bytes) -> None:
    body = b"a" * 100_000
    with dial(roomy) as connection:
        if b"chunked" in declared:
            connection.sendall(HEAD + declared + b"\r\n\r\n186a0\r\n" + body)
        else:
            connection.sendall(HEAD + declared + b"\r\n\r\n" + body)
        until(lambda: len(roomy.server.server_state.tasks) == 1)


def test_a_larger_body_that_is_silent_is_refused(
    roomy: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "bounds", patient(100_000, silence_seconds=0.2))
    with dial(roomy) as connection:
        begin(connection, b"Content-Length: 200000")
        came = b"".join(iter(lambda: connection.recv(1000), b""))
    assert came.startswith(b"HTTP/1.1 408")
    assert b"100000 bytes" in came


@pytest.mark.parametrize("pace", [{"grace_seconds": 0.1}, {"silence_seconds": 0.1}])
@pytest.mark.parametrize("ahead", [b"", SECOND])
def test_a_small_body_that_comes_too_slowly_is_refused(
    echoing: Running, monkeypatch: pytest.MonkeyPatch, pace: dict[str, float], ahead: bytes
) -> None:
    monkeypatch.setattr(Connection, "bounds", patient(2, **pace))
    with dial(echoing) as connection:
        connection.sendall(ahead + HEAD + b"Content-Length: 6\r\n\r\na")
        connection.sendall(b"b")  # buys nothing, or as much silence again
        came = b"".join(iter(lambda: connection.recv(1000), b""))
        connection.sendall(b"cdef")  # nobody minds
    assert came.count(b"HTTP/1.1 200") == bool(ahead)
    head, _, body = came.rpartition(b"HTTP/1.1 408 Request Timeout")[2].partition(b"\r\n\r\n")
    assert b"connection: close" in head
    told = json.loads(body)
    assert told["error_type"] == "timeout"
    assert "2 bytes" in told["error"]
    assert f"x-request-id: {told['request_id']}".encode() in head


class LittleLeft(Bounds):
    """A moment more, again and again for a while: a byte buys less than a loop can count."""

    looks: ClassVar[list[float]] = []

    def left(self, received: int, seconds: float, silent: float) -> float:
        self.looks.append(seconds)
        return 1e-5 if seconds < 0.2 else -1.0


def test_a_slow_body_is_looked_at_now_and_then(
    echoing: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "bounds", LittleLeft(1000, grace_seconds=0.01))
    with dial(echoing) as connection:
        connection.sendall(HEAD + b"Content-Length: 6\r\n\r\na")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    assert len(LittleLeft.looks) <= 0.2 / connections.LOOK_SECONDS + 2


def test_who_still_sends_hears_that_the_server_stops(echoing: Running) -> None:
    with dial(echoing) as connection:
        connection.sendall(HEAD + b"Content-Length: 6\r\n\r\nab")
        until(lambda: any(one._held for one in open_at(echoing)))
        echoing.server.should_exit = True
        came = b"".join(iter(lambda: connection.recv(1000), b""))
    assert came.startswith(b"HTTP/1.1 503")
    assert b'"draining"' in came


def test_nobody_is_borne_for_ten_seconds() -> None:
    """A tenth of a second is left for the server to notice."""
    bounds = Bounds(0)
    body = max(bounds.grace_seconds, bounds.silence_seconds) + connections.LINGER_SECONDS
    reader = Connection.stall_seconds * (1 + 1 / connections.LOOKS)
    assert max(Connection.head_seconds, body, reader) < 9.9
