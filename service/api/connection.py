"""One HTTP connection, with the deadlines and bounds that uvicorn and httptools leave open."""

from __future__ import annotations

import asyncio
import fcntl
import json
import resource
import socket
import struct
import sys
import termios
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.door import LINGER_BYTES, LINGER_SECONDS, SMALL_BYTES, Bounds
from service.api.openai_errors import openai_envelope, speaks_openai
from service.api.shedding import Reply, Shedder, whole
from service.net.filter import Come
from service.net.library import Counts

HEAD_BYTES = 16384  # of one request line and its headers
PIPELINED = 128  # requests that a client may send ahead of their replies
MAX_CONNECTIONS = 4096
HELD_BYTES = 1 << 20  # of a body, until it is there, where its length is known and no larger
HELD_BY_ALL = 64 << 20  # of such bodies, beyond what each connection may hold by itself
UNSENT_BYTES = 128 << 10  # that the system takes of a reply before the client takes any
OWN_FILES = 512  # descriptors that are for files, threads' pipes and other servers
LOOK_SECONDS = 0.02  # at least, between two looks at who sends a body
LOOKS = 10  # at who takes little, in the time that is given to who takes nothing

_UNSENT = getattr(socket, "TCP_NOTSENT_LOWAT", None)
_TOO_MANY = "too many connections are open"


class BadRequest(Exception):
    """What came is no request that this server takes; `status` and its reason."""

    def __init__(self, message: str, status: str = "400 Bad Request") -> None:
        super().__init__(message)
        self.status = status


class Room:
    """Bytes that all connections of a server may hold together."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> bool:
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        self._left += size


class Connection(HttpToolsProtocol):
    """A request's head must be complete `head_seconds` after the connection was made, or after
    the first byte that follows the reply before. Who takes nothing of a reply for `stall_seconds`
    is cut off. Connections over `max_open` are refused.

    A request is begun once its body is there, or more of it than may be held (`shared` bounds what
    all hold together): until then it costs no task, and `bounds` say how slowly it may come. What
    is there and would have to wait in a full server is refused by the `shedder`.

    httptools checks the syntax and lets everything else pass: what two readers of one request could
    understand differently is refused here, as is a head without end.
    """

    head_seconds: ClassVar[float] = 9.0  # with what it takes to notice, ten
    stall_seconds: ClassVar[float] = 7.5
    max_open: ClassVar[int] = 1024
    bounds: ClassVar[Bounds] = Bounds(SMALL_BYTES)
    shedder: ClassVar[Shedder] = Shedder()
    shared: ClassVar[Room] = Room(HELD_BY_ALL)
    counts: ClassVar[Counts] = Counts()  # the filter's, where there is one
    come: Come | None = None  # what it brings from there
    url: bytes = b""  # of the head that comes, as much as has come
    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _went_on = False  # a request, or a piece of its body, began or ended in what came last
    _endless = 0  # bytes since then, of a head, of trailers or of a chunk's extensions
    _begun = 0  # requests in what came last
    _upgrades = False  # the head asks for another protocol, and is read again without
    _running: RequestResponseCycle | None = None  # whose turn it is; uvicorn's own is the last one
    _held: tuple[RequestResponseCycle, Any] | None = None  # a request that has not begun
    _borrowed = 0  # bytes of the room that all share, for its body
    _since = _came = 0.0  # of its body: when its first and its last piece were expected and came
    _waited = 0.0  # for the head or body that comes, before we had the connection
    _between = False  # what came last was answered, and nothing came after it
    _unheard: int | None = None  # of an ended connection: bytes that may come before it is closed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.counts.open = len(self.connections)
        if self.come.full if self.come is not None else self.counts.open > self.max_open:
            transport.write(_envelope("503 Service Unavailable", _TOO_MANY, "overloaded"))
            transport.close()
            return
        # Whatever the system does not take at once pauses us, so that `pause_writing` hears of it.
        transport.set_write_buffer_limits(high=0)
        # And it takes little: who reads nothing of megabytes would have them all made for him.
        if _UNSENT is not None:
            with suppress(OSError):  # no TCP
                self._socket.setsockopt(socket.IPPROTO_TCP, _UNSENT, UNSENT_BYTES)
        if self.come is None:
            self._expect_head()
        else:
            self._resume(self.come)

    def _resume(self, come: Come) -> None:
        """With what the filter has read."""
        self.come, self._waited = None, come.waited
        self.data_received(come.content)
        self._waited = 0.0
        if self.flow.read_paused:  # before there was anything to pause: uvloop begins to read now
            self.loop.call_soon(self._pause_again)

    def _pause_again(self) -> None:
        if self.flow.read_paused:
            self.transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._got_head()
        self._taken()
        self._let_go()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        self.counts.open = len(self.connections)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self._ended(data):
            return
        self._unset_keepalive_if_required()
        self._begun, self._between = 0, False
        try:
            for start in range(0, len(data), HEAD_BYTES):
                self._feed(memoryview(data)[start : start + HEAD_BYTES])
        except (BadRequest, httptools.HttpParserError) as error:
            self._refuse(error)
            return
        if self._held is not None:
            self._expect_body()
        elif self._between or not (self.cycle is None or self.cycle.response_complete):
            self._got_head()
        else:
            self._expect_head()

    def _feed(self, data: memoryview) -> None:
        """Raises BadRequest, HttpParserError."""
        self._went_on = False
        self._parse(data)
        self._endless = 0 if self._went_on else self._endless + len(data)
        if self._endless > HEAD_BYTES:
            self._refuse_size()

    def _parse(self, rest: memoryview) -> None:
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
                self._without_upgrade()
            except httptools.HttpParserCallbackError as error:
                raise error.__context__ or error from None

    def _without_upgrade(self) -> None:
        """Read the head again without its wish for another protocol, which nobody has to grant:
        with it the parser takes what follows for that protocol, the request's own body too."""
        version = self.parser.get_http_version().encode()
        head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                words = (word.strip() for word in value.split(b","))
                value = b", ".join(word for word in words if word.lower() != b"upgrade")
            if name != b"upgrade":
                head.append(name + b": " + value)
        self._upgrades = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"\r\n".join([*head, b"", b""]))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._went_on, self._between = True, False

    def on_headers_complete(self) -> None:
        self._went_on = True
        self._check_head()
        if self.parser.should_upgrade():
            self._upgrades = True
            return
        self._begun += 1
        if max(self._begun, len(self.pipeline) + 1) > PIPELINED:
            raise BadRequest(f"more than {PIPELINED} requests wait for the reply to another")
        super().on_headers_complete()
        self.headers = []  # of trailers, which nobody reads

    def on_body(self, body: bytes) -> None:
        self._went_on = True
        super().on_body(body)
        self._begin()

    def on_message_complete(self) -> None:
        self._went_on = True
        if not self._upgrades:
            super().on_message_complete()
            self._begin()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """uvicorn has the head of a request whose turn it is."""
        self._held, self._since = (cycle, app), 0.0
        self._begin()

    def _begin(self) -> None:
        """Begin with what is held, or refuse it, if there is enough of it."""
        if self._held is None:
            return
        cycle, app = self._held
        if cycle.more_body and not cycle.waiting_for_100_continue and self._may_hold(cycle):
            return
        self._let_go()
        if cycle.more_body or self.pipeline or not self._shed(cycle):
            self._running = cycle
            super()._start_asgi_task(cycle, app)

    def _may_hold(self, cycle: RequestResponseCycle) -> bool:
        """Whether what is there of a body is kept until the rest is there."""
        if len(cycle.body) < SMALL_BYTES:
            return True
        if not self._borrowed:
            length = _length(cycle.scope)
            longest = min(HELD_BYTES, self.bounds.of(cycle.scope))
            if not SMALL_BYTES <= length <= longest or not self.shared.take(length):
                return False
            self._borrowed = length
        self.flow.resume_reading()  # which stopped until somebody takes what is there
        return True

    def _let_go(self) -> None:
        """Hold no request any more."""
        self._held = None
        if self._borrowed:
            self.shared.give_back(self._borrowed)
            self._borrowed = 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._held is not None:  # it stood behind the one that is answered now
            self._expect_body()

    def _shed(self, cycle: RequestResponseCycle) -> bool:
        reply = self.shedder.refusal(cycle.scope)
        if reply is None:
            return False
        self.transport.write(self._said(reply, cycle.keep_alive))
        cycle.response_started = cycle.response_complete = self._between = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()
        return True

    def _said(self, reply: Reply, keep_alive: bool) -> bytes:
        return whole(reply, self.server_state.default_headers, keep_alive)

    def _check_head(self) -> None:
        """Raises BadRequest."""
        version, size, hosts = self.parser.get_http_version(), len(self.url), []
        for name, value in self.headers:
            size += len(name) + len(value) + 4
            if name == b"host":
                hosts.append(value)
            elif name == b"transfer-encoding" and (value.lower() != b"chunked" or version == "1.0"):
                raise BadRequest("the only Transfer-Encoding is `chunked`, of HTTP/1.1")
        if size > HEAD_BYTES:
            self._refuse_size()
        if version not in ("1.1", "1.0"):
            raise BadRequest("this server speaks HTTP/1.1", "505 HTTP Version Not Supported")
        if len(hosts) > 1 or (not hosts and version == "1.1"):
            raise BadRequest(f"a request names its host once, and this {len(hosts)} times")
        if version == "1.0":
            self.expect_100_continue = False  # it could not read that answer
        if not self.url.startswith(b"/"):
            self._check_target(hosts)

    def _check_target(self, hosts: Sequence[bytes]) -> None:
        """A whole URL, as a proxy is asked, must name the same host as the header."""
        found = None if self.parser.get_method() == b"CONNECT" else httptools.parse_url(self.url)
        if found is None or not found.path or not found.host:
            raise BadRequest("the target of a request is a path, beginning with `/`")
        port = b"" if found.port is None else b":%d" % found.port
        if any(host.lower() != found.host.lower() + port for host in hosts):
            raise BadRequest("the URL and the Host header name different hosts")

    def _refuse_size(self) -> NoReturn:
        most = f"a request's head may have {HEAD_BYTES} bytes, and so may its trailers"
        raise BadRequest(most, "431 Request Header Fields Too Large")

    def _refuse(self, error: Exception) -> None:
        if self.cycle is None or self.cycle.response_complete:
            status = error.status if isinstance(error, BadRequest) else "400 Bad Request"
            self._end(_envelope(status, f"no HTTP request: {error}", "validation", self.url))
        else:  # in the middle of a reply there is no place for another one
            self.transport.close()

    def _end(self, reply: bytes) -> None:
        """Say this and no more. What still comes is read for a little while: with bytes unread the
        connection would be reset, and the client may lose the reply with it."""
        self.transport.write(reply)
        self.transport.write_eof()
        self._unheard = LINGER_BYTES
        self._got_head()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self._too_slow)

    def _ended(self, data: bytes) -> bool:
        if self._unheard is None:
            return False
        self._unheard -= len(data)
        if self._unheard < 0:
            self.transport.close()
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_at_taker(self._waits(), self.loop.time())

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def _look_at_taker(self, left: int, taken: float) -> None:
        self._stall = self.loop.call_later(
            self.stall_seconds / LOOKS, self._check_taker, left, taken
        )

    def _check_taker(self, before: int, taken: float) -> None:
        """To close would wait for the client, for ever, and so would the reply's sender."""
        now, left = self.loop.time(), self._waits()
        taken = now if left < before else taken
        if now - taken < self.stall_seconds:
            self._look_at_taker(left, taken)
            return
        # Reset, or the system would keep what it has for that client, and try for many minutes.
        at_once = struct.pack("ii", 1, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.transport.abort()

    def _waits(self) -> int:
        """Bytes that the client has not taken: ours, and what the system holds, of which it takes
        more from us only by the megabyte."""
        held = bytearray(4)
        with suppress(OSError):
            fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, held)
        return self.transport.get_write_buffer_size() + int.from_bytes(held, sys.byteorder)

    @property
    def _socket(self) -> socket.socket:
        found: socket.socket = self.transport.get_extra_info("socket")
        return found

    def _taken(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _expect_head(self) -> None:
        if self._deadline is None:
            left = max(self.head_seconds - self._waited, 0.0)
            self._deadline = self.loop.call_later(left, self._too_slow)

    def _got_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()

    def _expect_body(self) -> None:
        self._came = self.loop.time()
        if not self._since:
            self._got_head()
            self._since = self._came - self._waited
            patience = min(self.bounds.grace_seconds - self._waited, self.bounds.silence_seconds)
            self._deadline = self.loop.call_later(max(patience, LOOK_SECONDS), self._check_body)

    def _check_body(self) -> None:
        self._deadline = None
        if self._held is None:
            return
        (cycle, _), now = self._held, self.loop.time()
        left = self.bounds.left(len(cycle.body), now - self._since, now - self._came)
        if left > 0:
            # Loops count in milliseconds: within the last one it would be asked again and again.
            self._deadline = self.loop.call_later(max(left, LOOK_SECONDS), self._check_body)
            return
        reply = self.shedder.late(cycle.scope["path"], len(cycle.body), now - self._since)
        self._let_go()
        cycle.response_complete = True
        self._end(self._said(reply, keep_alive=False))

    def shutdown(self) -> None:
        """Nobody would begin any more with what is held."""
        if self._held is None:
            super().shutdown()
            return
        self._held[0].response_complete = True
        self._let_go()
        self._end(stopping())


def stopping() -> bytes:
    """What is said to a request that is not here when the server stops."""
    return _envelope("503 Service Unavailable", "this server is stopping", "draining")


def room() -> int:
    """How many connections leave descriptors for files. The limit is raised as far as it may be:
    many systems begin with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, soft - min(OWN_FILES, soft // 2))


def connection_class(
    max_open: int, bounds: Bounds | None = None, shedder: Shedder | None = None
) -> type[Connection]:
    """A Connection with its own bounds: uvicorn makes the instances, so a class carries them."""
    own: Mapping[str, Any] = {
        "max_open": max_open,
        "bounds": bounds,
        "shedder": shedder,
        "shared": Room(HELD_BY_ALL),
    }
    given = {name: value for name, value in own.items() if value is not None}
    return type("Connection", (Connection,), given)


def _length(scope: Mapping[str, Any]) -> int:
    """Of the body; 0 where the head does not say."""
    return next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)


def _envelope(status: str, message: str, error_type: str, url: bytes = b"") -> bytes:
    """A whole reply for what never became a request: it has no id. `url`: as much as has come."""
    said: dict[str, Any] = {"error": message, "error_type": error_type, "request_id": ""}
    if speaks_openai(url.decode("latin-1")):
        said = openai_envelope(int(status[:3]), error_type, message, None)
    body = json.dumps(said)
    again = "retry-after: 5\r\n" if status.startswith("503") else ""
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{again}"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()
