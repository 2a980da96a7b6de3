"""Places for what is costly and not a generation: checks of uploads, batches of documents, sums.

A body holds no place while it arrives (`service.api.spool` bounds those): who sends slowly keeps
nobody out. Who waits gets a place in turn, a tenant after the other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from service.api.turns import Turns
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
        self._lines = Turns()
        self._seconds = 1.0  # smoothed, of one that has a place

    def check(self, tenant: str) -> None:
        """Raise Overloaded where this tenant could not even wait."""
        mine, waiting = len(self._lines.get(tenant, ())), self._lines.waiting
        if not self._free and mine >= self._may_wait - waiting:
            raise Overloaded(
                f"too many uploads are under way: {waiting} wait, {mine} of them yours",
                retry_after=self._retry_after(),
            )

    async def take(self, tenant: str) -> Place:
        """A place, when it is this tenant's turn. Raises Overloaded."""
        if self._free:
            self._free -= 1
        else:
            self.check(tenant)
            await self._lines.wait(tenant, self._next)
        return Place(time.monotonic())

    def give_back(self, place: Place) -> None:
        self._seconds += 0.1 * (time.monotonic() - place.since - self._seconds)
        self._next()

    def _next(self) -> None:
        """A place is free: whose turn is it?"""
        if not self._lines:
            self._free += 1
            return
        self._lines.give(next(iter(self._lines)))

    def _retry_after(self) -> float:
        """About when all that wait now have had their turn."""
        return min(MAX_RETRY_AFTER, max(1.0, self._seconds * self._lines.waiting / self._at_once))
