"""Admission: who may start, decided before anything costly happens. No torch here.

A ticket is held from the first look at a request until its last byte. While a request is being
prepared (adapter looked up, prompt tokenized) it counts against the queue's bound like one that
already waits in the engine, so a flood of long prompts is refused as cheaply as a flood of short
ones. Where there are several tenants, one gets as much of the queue as it leaves for others: what
counts against the bound is what all have there, and what it has there once more.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Literal

from adapters.manifest import DEFAULT_TENANT
from service.errors import Draining, Overloaded, QuotaExceeded, ServiceError

State = Literal["loading", "ready", "draining", "failed"]

MAX_RETRY_AFTER = 60.0


class Loading(ServiceError):
    """The base is not loaded yet."""


class Ticket:
    """One admitted request. `prepared` when the engine has it; `release` when it is over."""

    def __init__(self, admission: Admission, tenant: str) -> None:
        self._admission = admission
        self._tenant = tenant
        self._preparing = True
        self._held = True
        self._meanwhile = ExitStack()
        self._since = time.monotonic()
        admission.preparing += 1
        admission.preparing_of[tenant] += 1
        admission.inside += 1

    def meanwhile(self, held: AbstractContextManager[None]) -> None:
        """Enter `held`, and leave it when the request is prepared or over."""
        self._meanwhile.enter_context(held)

    def prepared(self) -> None:
        if self._preparing:
            self._preparing = False
            self._admission.prepared(self._tenant)
            self._meanwhile.close()

    def release(self) -> None:
        """Idempotent: the reply's end and a client's going may both call it."""
        if self._held:
            self._held = False
            self.prepared()
            self._admission.left(time.monotonic() - self._since)


class Admission:
    """Counts what is inside; refuses with Loading, Draining, Overloaded or QuotaExceeded. One event
    loop only."""

    def __init__(self, max_queue: int, waiting: Callable[[], int] = lambda: 0) -> None:
        self.max_queue = max_queue
        self.state: State = "loading"
        self.preparing = 0  # admitted, not yet in the engine
        self.preparing_of: Counter[str] = Counter()  # the same by tenant, of those that have any
        self.inside = 0  # admitted, not yet released
        self._waiting = waiting
        self._waiting_of: Callable[[str], int] = lambda tenant: 0
        self._shared: Callable[[], bool] = lambda: False
        self._seconds = 1.0  # smoothed duration of a request
        self._empty = asyncio.Event()
        self._empty.set()

    def open(
        self,
        waiting: Callable[[], int],
        waiting_of: Callable[[str], int] = lambda tenant: 0,
        shared: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take requests from now on; `waiting()` is the length of the engine's queue, `waiting_of`
        of one tenant's part. `shared`: whether there are several tenants."""
        if self.state == "loading":
            self._waiting, self._waiting_of, self._shared = waiting, waiting_of, shared
            self.state = "ready"

    def drain(self) -> None:
        """Take nothing new. What is inside may finish: see `empty`."""
        self.state = "draining"

    def fail(self) -> None:
        self.state = "failed"

    def check(self) -> None:
        """Raise what an arriving request has to hear now, if it cannot be taken."""
        if self.state == "loading":
            raise Loading("the base is still being loaded; GET /ready says when it is there")
        if self.state == "draining":
            raise Draining("this server is stopping and takes no new requests")
        if self.state == "failed":
            raise ServiceError("the server could not start; its log has the cause")

    def check_room(self, tenant: str | None = None) -> None:
        """Raise what a request has to hear that would have to wait, if it cannot: anybody's, or one
        of this tenant."""
        self.check()
        queued = self._waiting() + self.preparing
        if queued >= self.max_queue:
            raise Overloaded(
                f"the queue is full: {queued} requests wait, the bound is {self.max_queue}",
                retry_after=self._retry_after(),
            )

        if tenant is None or not self._shared():
            return
        mine = self._waiting_of(tenant) + self.preparing_of[tenant]
        if mine >= self.max_queue - queued:
            raise QuotaExceeded(
                f"{queued} requests wait, {mine} of them yours, the bound is {self.max_queue}: "
                "what is left is for other tenants",
                retry_after=self._retry_after(),
            )

    def admit(self, tenant: str = DEFAULT_TENANT) -> Ticket:
        self.check_room(tenant)
        self._empty.clear()
        return Ticket(self, tenant)

    def prepared(self, tenant: str) -> None:
        self.preparing -= 1
        self.preparing_of[tenant] -= 1
        if not self.preparing_of[tenant]:
            del self.preparing_of[tenant]

    def left(self, seconds: float) -> None:
        self.inside -= 1
        self._seconds += 0.1 * (seconds - self._seconds)
        if self.inside == 0:
            self._empty.set()

    async def empty(self, within: float) -> bool:
        """Wait until nobody is inside; False when `within` seconds were not enough."""
        try:
            await asyncio.wait_for(self._empty.wait(), within)
        except TimeoutError:
            return False
        return True

    def _retry_after(self) -> float:
        """About when a place in the queue comes free: one request's time."""
        return min(MAX_RETRY_AFTER, max(1.0, self._seconds))
