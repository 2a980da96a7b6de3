"""The door: what every request passes before any route sees it.

It gives the request its id, bounds the size and the slowness of its body, refuses writes that a
foreign web page sends, turns whatever escapes into an envelope, and writes one line of log. Plain
ASGI, so that a client's going reaches the routes unchanged.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access.caller import redacted
from service.api.errors import Refused, failure, log_failure, too_slow
from service.tracing.trace import Passage as Trace
from service.tracing.trace import Tracing

LINGER_BYTES = 4 << 20  # of a refused body, read so that the client gets to see the refusal
LINGER_SECONDS = 1.5
SMALL_BYTES = 64 << 10  # a body that a client sends at once with its head
_UNSAFE_ID = re.compile(r"[^A-Za-z0-9._:-]")

logger = structlog.get_logger("nibble.http")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a body may be. A body of b bytes must be here after `grace + b / rate` seconds, without
    a silence of `silence_seconds`, however fast the rest of it came."""

    max_body_bytes: int
    by_route: Mapping[tuple[str, str], int] = field(default_factory=dict)
    by_pattern: Sequence[tuple[str, re.Pattern[str], int]] = ()  # method, whole path, bytes
    grace_seconds: float = 7.5
    silence_seconds: float = 7.5
    bytes_per_second: float = 16384.0

    def left(self, received: int, seconds: float, silent: float) -> float:
        """Seconds until a body of which so many bytes came, in so many seconds, came too slowly."""
        allowed = self.grace_seconds + received / self.bytes_per_second
        return min(allowed - seconds, self.silence_seconds - silent)

    @property
    def largest(self) -> int:
        """Bytes of the largest body of any route."""
        return max(self._sizes())

    @property
    def smallest(self) -> int:
        """Bytes of a body that no route refuses for its size."""
        return min(self._sizes())

    def _sizes(self) -> list[int]:
        patterns = (limit for _, _, limit in self.by_pattern)
        return [self.max_body_bytes, *self.by_route.values(), *patterns]

    def of(self, scope: Mapping[str, Any]) -> int:
        for method, path, limit in self.by_pattern:
            if method == scope["method"] and path.fullmatch(scope["path"]):
                return limit
        return self.by_route.get((scope["method"], scope["path"]), self.max_body_bytes)


class Door:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, bounds: Bounds, tracing: Tracing) -> None:
        self.app = app
        self.bounds = bounds
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Always the server's own: a client's id is logged, and never a key of anything.
        scope["request_id"] = secrets.token_hex(8)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=scope["request_id"])
        with self.tracing.passage(scope) as trace:
            if trace.trace_id:
                structlog.contextvars.bind_contextvars(trace_id=trace.trace_id)
            await _Passage(self, trace, scope, receive, send).run()


class _Passage:
    """One request on its way through the door."""

    def __init__(
        self, door: Door, trace: Trace, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._app = door.app
        self._trace = trace
        self._bounds = door.bounds
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers = Headers(scope=scope)
        self._limit = door.bounds.of(scope)
        self._unread = self._has_body()
        self._small = self._has_small_body()
        self._lingered = False
        self._received = 0
        self._since = time.monotonic()
        self._refusal: Refused | None = None
        self._status = 0

    async def run(self) -> None:
        try:
            self._check_head()
            await self._app(self._scope, self.receive, self.send)
            if self._refusal is not None and not self._status:
                raise self._refusal
        except Exception as error:
            if self._status:  # too late for an answer: let the server cut the connection
                log_failure(error)
                raise
            await self._answer(self._refusal or error)
        finally:
            self._trace.answered(self._status)
            self._log()

    async def receive(self) -> Message:
        if not self._unread:
            return await self._receive()
        message = await self._receive_in_time()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._unread = bool(message.get("more_body", False))
            if self._received > self._limit:
                raise self._refuse_size("more than that arrived")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._refusal is not None:
                return  # whatever the route made of it, the refusal is the answer
            if self._unread and self._small:
                await self._linger()  # it is here already: the connection need not end for it
            self._status = message["status"]
            self._sign(message)
        elif self._refusal is not None and not self._status:
            return
        ends = message["type"] == "http.response.body" and not message.get("more_body", False)
        if ends and self._unread and not self._lingered:
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    def _has_body(self) -> bool:
        length = self._headers.get("content-length", "0")
        return "transfer-encoding" in self._headers or length.strip("0") != ""

    def _has_small_body(self) -> bool:
        length = self._headers.get("content-length", "")
        return length.isdecimal() and int(length) <= SMALL_BYTES

    def _check_head(self) -> None:
        length = self._headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limit:
            raise self._refuse_size(f"Content-Length is {length[:20]}")
        if self._scope["method"] not in ("GET", "HEAD"):
            self._check_origin()

    def _check_origin(self) -> None:
        """A browser sends the page's origin with every write: foreign pages may not use the
        server of whoever looks at them."""
        origin = self._headers.get("origin")
        if origin is not None and _place(origin) != self._headers.get("host"):
            raise Refused(
                403,
                "forbidden",
                f"a page of {origin[:80]!r} may not write here, only this server's own pages",
            )

    async def _receive_in_time(self) -> Message:
        left = self._bounds.left(self._received, time.monotonic() - self._since, 0.0)
        try:
            async with asyncio.timeout(max(left, 0.001)):
                return await self._receive()
        except TimeoutError:
            self._refusal = too_slow(self._received, time.monotonic() - self._since)
            self._small = False  # the answer waits for nothing
            raise self._refusal from None

    def _refuse_size(self, what: str) -> Refused:
        self._refusal = Refused(
            413, "too_large", f"the body may have at most {self._limit} bytes; {what}"
        )
        return self._refusal

    def _sign(self, message: Message) -> None:
        headers = MutableHeaders(scope=message)
        headers["x-request-id"] = self._scope["request_id"]
        headers["x-content-type-options"] = "nosniff"
        if self._unread:
            headers["connection"] = "close"

    async def _answer(self, error: Exception) -> None:
        answer = failure(error)
        if answer.status >= 500:
            log_failure(error)
        self._refusal = None
        await answer.reply(self._scope)(self._scope, self.receive, self.send)

    async def _linger(self) -> None:
        """Read a little more of a body that nobody wants: a connection that is closed with unread
        bytes is reset, and the client may lose the reply with it."""
        self._lingered = True
        if "expect" in self._headers:
            return  # the body was never asked for
        end = time.monotonic() + LINGER_SECONDS
        limit = self._received + LINGER_BYTES
        while self._received < limit:
            try:
                async with asyncio.timeout(max(end - time.monotonic(), 0.001)):
                    message = await self._receive()
            except TimeoutError:
                return
            self._received += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                self._unread = False
                return

    def _log(self) -> None:
        """Method, path, status, time. Never a query, a header or a body."""
        said: dict[str, Any] = {
            "method": self._scope["method"][:16],
            "path": redacted(self._scope["path"])[:200],
            "status": self._status,
            "seconds": round(time.monotonic() - self._since, 4),
        }
        if theirs := self._headers.get("x-request-id"):
            said["client_request_id"] = _UNSAFE_ID.sub("?", theirs[:64])
        quiet = self._scope["path"] in ("/health", "/ready", "/metrics")
        (logger.debug if quiet else logger.info)("request", **said)


def _place(origin: str) -> str | None:
    """Host and port; None where it is no URL."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
