"""Threads for what may take minutes: an upload's checks, a load, a delete that waits for what runs.

Who waits gets one in turn, a tenant after the other. Where there are several tenants, one has as
many as it leaves free: it could else hold all of them until its longest request has ended.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

from adapters.manifest import DEFAULT_TENANT
from service.api.turns import Turns

T = TypeVar("T")

TENANT = ContextVar("tenant", default=DEFAULT_TENANT)  # whose request is being answered


class Threads:
    """So many at once. One event loop only."""

    def __init__(self, at_once: int, name: str, shared: Callable[[], bool]) -> None:
        """`shared`: whether there are several tenants."""
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix=name)
        self._at_once = at_once
        self._shared = shared
        self._held: Counter[str] = Counter()
        self._lines = Turns()

    async def run(self, work: Callable[[], T]) -> T:
        """Run this for the tenant who asks. Once begun it is not undone when the client goes: its
        thread is held until it has ended."""
        tenant = TENANT.get()
        if tenant not in self._lines and self._free(tenant):
            self._held[tenant] += 1
        else:
            await self._lines.wait(tenant, lambda: self._end(tenant))
        try:
            begun = asyncio.get_running_loop().run_in_executor(self._pool, work)
        except RuntimeError:  # the server stops
            self._end(tenant)
            raise
        begun.add_done_callback(lambda _: self._end(tenant))
        return await asyncio.shield(begun)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _free(self, tenant: str) -> bool:
        free = self._at_once - self._held.total()
        return free > 0 and (not self._shared() or self._held[tenant] < free)

    def _end(self, tenant: str) -> None:
        """A thread is free: whose turn is it?"""
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        while (next_one := next(filter(self._free, self._lines), None)) is not None:
            self._held[next_one] += 1
            self._lines.give(next_one)
