"""One HTTP connection, with the deadlines and bounds that uvicorn leaves open."""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES = 16384  # of one request line and its headers

_TOO_MANY = "too many connections are open"


class Connection(H11Protocol):
    """A request's head must be complete `head_seconds` after the connection was made, or after
    the first byte that follows the reply before. Connections over `max_open` are refused."""

    head_seconds: ClassVar[float] = 10.0
    max_open: ClassVar[int] = 1024
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_open:
            transport.write(_envelope("503 Service Unavailable", _TOO_MANY, "overloaded"))
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

    def send_400_response(self, msg: str) -> None:
        # In the middle of a reply there is no place for another one.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_envelope("400 Bad Request", msg, "validation"))
        self.transport.close()

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


def _envelope(status: str, message: str, error_type: str) -> bytes:
    """A whole reply for what never became a request: it has no id."""
    body = json.dumps({"error": message, "error_type": error_type, "request_id": ""})
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nretry-after: 5\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()
