"""Who may come in: how many wait, which adapters are leaving, whether the engine serves at all."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

from adapters.errors import AdapterNotFound
from service.engine.request import AdapterRef
from service.errors import Draining, EngineFailed, Overloaded

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
        self._max_waiting = max_waiting
        self._max_tokens = max_waiting_tokens
        self._waiting = 0
        self._tokens = 0
        self._pace = Pace()

    @property
    def waiting(self) -> int:
        """Sequences, at this moment."""
        return self._waiting

    def check(self, ref: AdapterRef | None) -> None:
        """Raises EngineFailed, Draining or AdapterNotFound."""
        with self.lock:
            if self.failure is not None:
                raise EngineFailed(self.failure)
            if self.draining:
                raise Draining("the server is stopping and takes no new requests")
            if ref is not None and ref.digest in self.forgotten:
                raise AdapterNotFound(ref.name)

    def enter(self, ref: AdapterRef | None, sequences: int, tokens: int) -> None:
        """So many more wait, with prompts of so many tokens. Raises what `check` does, or
        Overloaded."""
        with self.lock:
            self.check(ref)
            if self._waiting + sequences > self._max_waiting:
                raise Overloaded(
                    f"{self._waiting} sequences wait already, {self._max_waiting} may",
                    retry_after=1.0,
                )
            over = self._tokens + sequences * tokens - (self._max_tokens or 0)
            if self._max_tokens is not None and self._waiting and over > 0:
                raise Overloaded(
                    f"prompts of {self._tokens} tokens wait already, of {self._max_tokens} may, "
                    f"and this is {sequences * tokens} more",
                    retry_after=self._pace.seconds(over, time.monotonic()),
                )
            if not self._waiting:
                self._pace.begin(time.monotonic())
            self._waiting += sequences
            self._tokens += sequences * tokens

    def leave_queue(self, tokens: int) -> None:
        """One that waited, with a prompt of so many tokens, was admitted, or ended."""
        with self.lock:
            self._waiting -= 1
            self._tokens -= tokens
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
