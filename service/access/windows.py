"""Sliding windows of a minute, in memory or in a Redis that several servers share: `limits`.

Imported when the first tenant with such a quota comes: it takes a tenth of a second.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string

log = logging.getLogger(__name__)

HERE = "async+memory://"
MINUTE = 60.0
ANSWER_SECONDS = 0.25  # for the store
AWAY_SECONDS = 5.0  # until one that gave no answer is asked again


class Windows:
    """What each tenant has used of its last minute. Made in the event loop that it runs in.

    A store that does not answer must not stop all servers at once: until it does, each counts for
    itself.
    """

    def __init__(self, store: str | None) -> None:
        self._own = _Window(HERE)
        self._shared = None if store in (None, HERE) else _Window(store)
        self._away_until = -math.inf

    async def take(
        self, tenant: str, what: str, most: int, amount: int, *, keep: bool = True
    ) -> tuple[int, float] | None:
        """Take `amount` of a minute's `most`; without `keep` only look whether it is there, and
        with a negative one give back. None, or what is left and the seconds until it is more."""
        if self._shared is not None and time.monotonic() >= self._away_until:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    return await self._shared.take(tenant, what, most, amount, keep)
            except (StorageError, TimeoutError) as error:
                self._away_until = time.monotonic() + AWAY_SECONDS
                why = str(error) or f"no answer within {ANSWER_SECONDS:g} s"
                log.warning("quotas are counted by each server for itself: %s", why)
        return await self._own.take(tenant, what, most, amount, keep)


class _Window:
    """The windows of one store. Raises StorageError."""

    def __init__(self, store: str) -> None:
        client = {"implementation": "redispy"} if "redis" in store else {}
        storage: Any = storage_from_string(store, wrap_exceptions=True, **client)
        self._storage = storage
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def take(
        self, tenant: str, what: str, most: int, amount: int, keep: bool
    ) -> tuple[int, float] | None:
        item, names = RateLimitItemPerMinute(most), ("nibble", tenant, what)
        do = self._limiter.hit if keep else self._limiter.test
        if await do(item, *names, cost=amount):
            return None
        key = item.key_for(*names)
        counted = await self._storage.get_sliding_window(key, item.get_expiry())
        return _left(counted, most), max(1.0, _seconds_until(counted, most, amount))


# What `limits` counts: of the minute before this one and how many seconds of it still weigh, and of
# this one and how long its count is kept: a minute after it has ended.
Counted = tuple[int, float, int, float]


def _left(counted: Counted, most: int) -> int:
    before, weighs, now, _ = counted
    return max(0, most - math.floor(before * weighs / MINUTE + now))


def _seconds_until(counted: Counted, most: int, amount: int) -> float:
    """When `amount` is free if nobody takes or gives back any meanwhile. `limits` itself says when
    one more will be, which is no help to who wants many."""
    before, weighs, now, kept = counted
    ends = max(0.0, kept - MINUTE)
    fits = most - amount + 1  # what is counted has to be below
    if now < fits:
        return weighs - MINUTE * (fits - now) / before if before > 0 else 0.0
    return ends + MINUTE * (1 - fits / now)
