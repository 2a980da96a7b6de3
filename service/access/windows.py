"""Sliding windows of a minute, in memory or in a Redis that several servers share: `limits`.

Imported when the first tenant with such a quota comes: it takes a tenth of a second.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string

log = logging.getLogger(__name__)


class Windows:
    """What each tenant has used of its last minute. Made in the event loop that it runs in."""

    def __init__(self, store: str) -> None:
        client = {"implementation": "redispy"} if "redis" in store else {}
        storage: Any = storage_from_string(store, wrap_exceptions=True, **client)
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def take(
        self, tenant: str, what: str, most: int, amount: int, *, keep: bool = True
    ) -> tuple[int, float] | None:
        """Take `amount` of a minute's `most`; without `keep` only look whether it is there, and
        with a negative one give back. None, or what is left and the seconds until it is more.

        A Redis that does not answer lets everybody pass: it would stop all servers at once.
        """
        item, names = RateLimitItemPerMinute(most), ("nibble", tenant, what)
        do = self._limiter.hit if keep else self._limiter.test
        try:
            if await do(item, *names, cost=amount):
                return None
            stats = await self._limiter.get_window_stats(item, *names)
        except StorageError as error:
            log.warning("quotas are not counted: %s", error)
            return None
        return stats.remaining, max(1.0, min(stats.reset_time - time.time(), 60.0))
