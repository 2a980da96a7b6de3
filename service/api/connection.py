"""One HTTP connection, with the deadlines and bounds that uvicorn leaves open."""

from __future__ import annotations

import asyncio
import fcntl
import json
import resource
import socket
import struct
import sys
import termios
from contextlib import suppress
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES = 16384  # of one request line and its headers
MAX_CONNECTIONS = 4096
OWN_FILES = 512  # descriptors that are for files, threads' pipes and other servers
LOOKS = 10  # at who takes little, in the time that is given to who takes nothing

_TOO_MANY = "too many connections are open"


class Connection(H11Protocol):
    """A request's head must be complete `head_seconds` after the connection was made, or after
    the first byte that follows the reply before. Who takes nothing of a reply for `stall_seconds`
    is cut off. Connections over `max_open` are refused."""

    head_seconds: ClassVar[float] = 10.0
    stall_seconds: ClassVar[float] = 10.0
    max_open: ClassVar[int] = 1024
    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_open:
            transport.write(_envelope("503 Service Unavailable", _TOO_MANY, "overloaded"))
            transport.close()
            return
        # Whatever the system does not take at once pauses us, so that `pause_writing` hears of it.
        transport.set_write_buffer_limits(high=0)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._got_head()
        self._taken()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        else:
            self._got_head()

    def send_400_response(self, msg: str) -> None:
        # In the middle of a reply there is no place for another one.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_envelope("400 Bad Request", msg, "validation"))
        self.transport.close()

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
            self._deadline = self.loop.call_later(self.head_seconds, self._too_slow)

    def _got_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()


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


def connection_class(max_open: int) -> type[Connection]:
    """A Connection with its own bound: uvicorn makes the instances, so a class carries it."""
    bound: dict[str, Any] = {"max_open": max_open}
    return type("Connection", (Connection,), bound)


def _envelope(status: str, message: str, error_type: str) -> bytes:
    """A whole reply for what never became a request: it has no id."""
    body = json.dumps({"error": message, "error_type": error_type, "request_id": ""})
    again = "retry-after: 5\r\n" if status.startswith("503") else ""
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{again}"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()
