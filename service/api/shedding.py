"""What a full server says before a request costs it anything: replies as bytes, and one line of
log a second for all of them.

Beyond its capacity a server does little but refuse. A request that would have to wait, and cannot,
is refused by its connection: no task, no route, no key is looked up (who sends a wrong one to a
full server hears 503 as well), and no span is made. The routes ask once more, for what comes
another way.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any

import structlog
from starlette.routing import BaseRoute

from service.admission import Admission
from service.api.access import Guarded
from service.api.door import Bounds
from service.api.errors import Failure, Refused, failure, too_slow
from service.api.openai_errors import speaks_openai
from service.errors import Overloaded, ServiceError

LINE_SECONDS = 1.0  # between two lines of log
KEPT = 64  # replies; they differ by how many wait or came, and by when to come again
ID = b"#" * 16  # where a request's id belongs

Reply = tuple[bytes, bytes]  # the status line, and all behind it: between is the connection's place

logger = structlog.get_logger("nibble.http")


class Shedder:
    """Refuses for the server's sake. One event loop only."""

    def __init__(
        self,
        admission: Admission | None = None,
        routes: Iterable[BaseRoute] = (),
        count: Callable[[str], None] = lambda error_type: None,
    ) -> None:
        """`routes`: of which those that queue are looked after; `count` hears of each refusal."""
        self._admission = admission
        self._queues = frozenset(
            (method, route.path)
            for route in routes
            if isinstance(route, Guarded) and route.queues
            for method in route.methods or ()
        )
        self._count = count
        self._made: dict[tuple[str, int, bool], tuple[Failure, Reply]] = {}
        self._log = Lines()

    def refusal(self, scope: Mapping[str, Any]) -> Reply | None:
        """What this request hears at once; None where a route answers it."""
        if self._admission is None or (scope["method"], scope["path"]) not in self._queues:
            return None
        try:
            self._admission.check_room()
        except ServiceError as error:
            return self._refuse(error, scope["path"])
        return None

    def late(self, path: str, received: int, seconds: float) -> Reply:
        """What is said to a body that came too slowly."""
        return self._signed(*self._rendered(too_slow(received, seconds), path))

    def _refuse(self, error: ServiceError, path: str) -> Reply:
        answer, reply = self._rendered(error, path)
        self._count(answer.error_type)
        return self._signed(answer, reply)

    def _rendered(self, error: Exception, path: str) -> tuple[Failure, Reply]:
        again = math.ceil(error.retry_after) if isinstance(error, Overloaded) else 0
        key = (str(error), again, speaks_openai(path))
        made = self._made.get(key)
        if made is None:
            if len(self._made) >= KEPT:
                self._made.clear()
            answer = failure(error)
            made = self._made[key] = (answer, rendered(answer, path))
        return made

    def _signed(self, answer: Failure, reply: Reply) -> Reply:
        request_id = self._log.note(f"{answer.status} {answer.error_type}")
        return reply[0], reply[1].replace(ID, request_id)


def late_reply(bounds: Bounds, path: str) -> Reply:
    """What is said to a body that came too slowly, by who says the same to all."""
    grace, rate, silence = bounds.grace_seconds, bounds.bytes_per_second, bounds.silence_seconds
    how = f"it has {grace:g} seconds and one more for each {rate:.0f} bytes"
    what = f"the body came too slowly: {how}, and may not stop for {silence:g}"
    return rendered(failure(Refused(408, "timeout", what)), path)


def whole(reply: Reply, headers: Iterable[tuple[bytes, bytes]], keep_alive: bool) -> bytes:
    """With the headers that the connection adds."""
    own = [b"%s: %s\r\n" % pair for pair in headers]
    return b"".join([reply[0], *own, b"" if keep_alive else b"connection: close\r\n", reply[1]])


def tell(prefix: str, first: int, last: int, counts: Mapping[str, int]) -> None:
    """One line for all that were refused in a second. Their ids count up, so that the first and the
    last name those between as well."""
    ids = {"first": numbered(prefix, first), "last": numbered(prefix, last)}
    logger.info("requests refused", seconds=LINE_SECONDS, **ids, **counts)


def numbered(prefix: str, number: int) -> str:
    """The id of a request that was refused."""
    return f"{prefix}{number & 0xFFFFFF:06x}"


class Lines:
    """Numbers requests that are refused, and tells of them once a second."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(5)
        self._number = self._first = 0
        self._counts: Counter[str] = Counter()

    def note(self, what: str) -> bytes:
        """The id of a request that is refused."""
        self._number += 1
        if not self._counts:
            self._first = self._number
            asyncio.get_running_loop().call_later(LINE_SECONDS, self._tell)
        self._counts[what] += 1
        return numbered(self._prefix, self._number).encode()

    def _tell(self) -> None:
        counts, self._counts = self._counts, Counter()
        tell(self._prefix, self._first, self._number, counts)


def rendered(answer: Failure, path: str) -> Reply:
    """The reply that the door would send, with `ID` for the request's id."""
    reply = answer.reply({"path": path, "request_id": ID.decode()})
    status = HTTPStatus(reply.status_code)
    own = [(b"x-request-id", ID), (b"x-content-type-options", b"nosniff")]
    rest = [b"%s: %s\r\n" % pair for pair in (*reply.raw_headers, *own)]
    first = b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode())
    return first, b"".join([*rest, b"\r\n", bytes(reply.body)])
