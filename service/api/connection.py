"""One HTTP connection, with the deadlines and bounds that uvicorn leaves open."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES = 16384  # of one request line and its headers

_BODY = b'{"error":"too many connections are open","error_type":"overloaded","request_id":""}'
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\n"
    b"connection: close\r\ncontent-length: " + str(len(_BODY)).encode() + b"\r\n\r\n" + _BODY
)


class Connection(H11Protocol):
    """A request's head must be complete `head_seconds` after the connection was made, or after
    the first byte that follows the reply before. Connections over `max_open` are refused."""

    head_seconds: ClassVar[float] = 10.0
    max_open: ClassVar[int] = 1024
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_open:
            transport.write(_TOO_MANY)
            transport.close()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._got_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        else:
            self._got_head()

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


def connection_class(max_open: int) -> type[Connection]:
    """A Connection with its own bound: uvicorn makes the instances, so a class carries it."""
    bound: dict[str, Any] = {"max_open": max_open}
    return type("Connection", (Connection,), bound)
