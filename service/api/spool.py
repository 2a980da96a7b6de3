"""Bodies of uploads on their way to the disk, and those that wait there for a place.

They are bounded in number, as each is an open file, and by the bytes that have come, whatever was
announced. Of both a tenant may take as much as is left besides: half at most, and what comes of
another tenant always finds some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from starlette.types import Message

from service.errors import Overloaded

RETRY_SECONDS = 5.0


class Spool:
    """One event loop only."""

    def __init__(self, max_bytes: int, max_bodies: int) -> None:
        self._max_bytes = max_bytes
        self._max_bodies = max_bodies
        self._bytes: Counter[str] = Counter()  # by tenant
        self._bodies: Counter[str] = Counter()

    @contextmanager
    def arriving(self, request: Request, tenant: str) -> Iterator[Request]:
        """The request, counted as its body is read, until the block ends. What it brings has to
        have left the disk by then.

        Raises Overloaded, at once where what the head announces has no room now.
        """
        length = request.headers.get("content-length", "")
        self._check(tenant, int(length) if length.isdecimal() else 0)
        self._bodies[tenant] += 1
        arrived = 0

        async def receive() -> Message:
            nonlocal arrived
            message = await request.receive()
            more = len(message.get("body", b""))
            self._bytes[tenant] += more
            arrived += more
            self._check_bytes(tenant, 0)
            return message

        try:
            yield Request(request.scope, receive)
        finally:
            self._bytes[tenant] -= arrived
            self._bodies[tenant] -= 1
            if not self._bodies[tenant]:
                del self._bodies[tenant], self._bytes[tenant]

    def _check(self, tenant: str, announced: int) -> None:
        bodies, mine = self._bodies.total(), self._bodies[tenant]
        if mine >= self._max_bodies - bodies:
            raise Overloaded(
                f"too many uploads arrive at once: {bodies}, {mine} of them yours", RETRY_SECONDS
            )
        self._check_bytes(tenant, announced)

    def _check_bytes(self, tenant: str, more: int) -> None:
        total, mine = self._bytes.total(), self._bytes[tenant]
        if mine + more > self._max_bytes - total - more:
            raise Overloaded(
                f"uploads that are under way take {total} bytes on the server's disk, {mine} of "
                "them yours: there is no room for this one now",
                RETRY_SECONDS,
            )
