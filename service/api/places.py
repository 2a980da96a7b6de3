"""Places for what is costly and not a generation: checks of uploads, batches of documents, sums.

A body holds no place while it arrives (`service.api.spool` bounds those): who sends slowly keeps
nobody out. Who waits gets a place in turn, a tenant after the other.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

from service.errors import Overloaded

MAX_RETRY_AFTER = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """Held until it is given back, once."""

    since: float


class Places:
    """So many at once; others wait, and may as long as the line has more room left than their
    tenant takes of it: one tenant gets half of it at most, and another always finds room. One event
    loop only."""

    def __init__(self, at_once: int, may_wait: int) -> None:
        self._at_once = at_once
        self._may_wait = may_wait
        self._free = at_once
        self._waiting = 0
        # By tenant, whose turn it is first.
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._seconds = 1.0  # smoothed, of one that has a place

    def check(self, tenant: str) -> None:
        """Raise Overloaded where this tenant could not even wait."""
        mine = len(self._lines.get(tenant, ()))
        if not self._free and mine >= self._may_wait - self._waiting:
            raise Overloaded(
                f"too many uploads are under way: {self._waiting} wait, {mine} of them yours",
                retry_after=self._retry_after(),
            )

    async def take(self, tenant: str) -> Place:
        """A place, when it is this tenant's turn. Raises Overloaded."""
        if self._free:
            self._free -= 1
        else:
            self.check(tenant)
            await self._turn(tenant)
        return Place(time.monotonic())

    def give_back(self, place: Place) -> None:
        self._seconds += 0.1 * (time.monotonic() - place.since - self._seconds)
        self._next()

    async def _turn(self, tenant: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(tenant, deque()).append(turn)
        self._waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given a place that nobody uses now
                self._next()
            else:
                self._leave(tenant, turn)
            raise

    def _next(self) -> None:
        """A place is free: whose turn is it?"""
        if not self._lines:
            self._free += 1
            return
        tenant = next(iter(self._lines))
        turn = self._lines[tenant][0]
        self._leave(tenant, turn)
        if tenant in self._lines:
            self._lines.move_to_end(tenant)
        turn.set_result(None)

    def _leave(self, tenant: str, turn: asyncio.Future[None]) -> None:
        self._waiting -= 1
        self._lines[tenant].remove(turn)
        if not self._lines[tenant]:
            del self._lines[tenant]

    def _retry_after(self) -> float:
        """About when all that wait now have had their turn."""
        return min(MAX_RETRY_AFTER, max(1.0, self._seconds * self._waiting / self._at_once))
