"""Who may come in: how many wait, which adapters are leaving, whether the engine serves at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from adapters.errors import AdapterNotFound
from adapters.manifest import DEFAULT_TENANT
from service.engine.request import AdapterRef
from service.errors import Draining, EngineFailed, Overloaded, QuotaExceeded

MAX_RETRY_AFTER = 60.0
KEPT = 0.9  # of what is known of the pace, when another one leaves


class Pace:
    """By how many tokens a second a queue becomes shorter, while there is one."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._since = 0.0  # it was empty, or one left

    def begin(self, now: float) -> None:
        self._since = now

    def left(self, tokens: int, now: float) -> None:
        self._tokens = KEPT * self._tokens + tokens
        self._seconds = KEPT * self._seconds + now - self._since
        self._since = now

    def seconds(self, tokens: int, now: float) -> float:
        """About how long until so many have left."""
        if not self._tokens:
            return 1.0
        each = (self._seconds + now - self._since) / self._tokens
        return min(MAX_RETRY_AFTER, max(1.0, tokens * each))


@dataclass(slots=True)
class Waiting:
    """What waits: of all, or of one tenant."""

    sequences: int = 0
    tokens: int = 0  # of their prompts

    def add(self, sequences: int, tokens: int) -> None:
        self.sequences += sequences
        self.tokens += tokens


class Door:
    """Any thread. What has to hold between a check and its consequence is done with `lock` held."""

    def __init__(self, max_waiting: int, max_waiting_tokens: int | None = None) -> None:
        """
        max_waiting         sequences that were submitted and not yet admitted
        max_waiting_tokens  of their prompts; a prompt that comes when none waits is no matter
        """
        self.lock = threading.RLock()
        self.draining = False
        self.failure: str | None = None
        self.forgotten: dict[str, Future[None]] = {}  # by digest; done when nothing is left of it
        # Whether there are several tenants: then one gets as much as it leaves for others.
        self.shared: Callable[[], bool] = lambda: False
        self._max_waiting = max_waiting
        self._max_tokens = max_waiting_tokens
        self._all = Waiting()
        self._of: dict[str, Waiting] = {}  # of tenants that have any
        self._pace = Pace()

    @property
    def waiting(self) -> int:
        """Sequences, at this moment."""
        return self._all.sequences

    def waiting_of(self, tenant: str) -> int:
        """Sequences of one tenant, at this moment."""
        mine = self._of.get(tenant)
        return 0 if mine is None else mine.sequences

    def check(self, ref: AdapterRef | None) -> None:
        """Raises EngineFailed, Draining or AdapterNotFound."""
        with self.lock:
            if self.failure is not None:
                raise EngineFailed(self.failure)
            if self.draining:
                raise Draining("the server is stopping and takes no new requests")
            if ref is not None and ref.digest in self.forgotten:
                raise AdapterNotFound(ref.name)

    def enter(
        self,
        ref: AdapterRef | None,
        sequences: int,
        tokens: int,
        tenant: str = DEFAULT_TENANT,
    ) -> None:
        """So many more wait, with prompts of so many tokens. Raises what `check` does, Overloaded,
        or QuotaExceeded where the room that is left is for other tenants."""
        with self.lock:
            self.check(ref)
            if self._all.sequences + sequences > self._max_waiting:
                raise Overloaded(
                    f"{self._all.sequences} sequences wait already, {self._max_waiting} may",
                    retry_after=1.0,
                )
            over = self._all.tokens + sequences * tokens - (self._max_tokens or 0)
            if self._max_tokens is not None and self._all.sequences and over > 0:
                raise Overloaded(
                    f"prompts of {self._all.tokens} tokens wait already, of {self._max_tokens} "
                    f"may, and this is {sequences * tokens} more",
                    retry_after=self._pace.seconds(over, time.monotonic()),
                )
            mine = self._of.get(tenant, Waiting())
            if mine.sequences and self.shared():
                self._check_share(mine, sequences, sequences * tokens)
            if not self._all.sequences:
                self._pace.begin(time.monotonic())
            self._of[tenant] = mine
            for line in (self._all, mine):
                line.add(sequences, sequences * tokens)

    def _check_share(self, mine: Waiting, sequences: int, tokens: int) -> None:
        """Raises QuotaExceeded where this tenant would have more than it leaves for others."""
        if mine.sequences + self._all.sequences + sequences > self._max_waiting:
            raise QuotaExceeded(
                f"{self._all.sequences} sequences wait already, {mine.sequences} of them yours, "
                f"{self._max_waiting} may: what is left is for other tenants"
            )
        over = mine.tokens + self._all.tokens + tokens - (self._max_tokens or 0)
        if self._max_tokens is not None and over > 0:
            raise QuotaExceeded(
                f"prompts of {self._all.tokens} tokens wait already, {mine.tokens} of them yours, "
                f"of {self._max_tokens} may, and this is {tokens} more: what is left is for other "
                "tenants",
                retry_after=self._pace.seconds(over, time.monotonic()),
            )

    def leave_queue(self, tokens: int, tenant: str = DEFAULT_TENANT) -> None:
        """One that waited, with a prompt of so many tokens, was admitted, or ended."""
        with self.lock:
            for line in (self._all, mine := self._of[tenant]):
                line.add(-1, -tokens)
            if not mine.sequences:
                del self._of[tenant]
            self._pace.left(tokens, time.monotonic())

    def drain(self) -> None:
        with self.lock:
            self.draining = True

    def fail(self, reason: str) -> None:
        """Nothing comes in any more; the first reason stays."""
        with self.lock:
            self.failure = self.failure or reason

    def forget(self, digest: str) -> Future[None]:
        """Nothing comes in for this digest until the future is done."""
        with self.lock:
            return self.forgotten.setdefault(digest, Future())
