"""Who may come in: how many wait, which adapters are leaving, whether the engine serves at all."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from adapters.errors import AdapterNotFound
from service.engine.request import AdapterRef
from service.errors import Draining, EngineFailed, Overloaded


class Door:
    """Any thread. What has to hold between a check and its consequence is done with `lock` held."""

    def __init__(self, max_waiting: int) -> None:
        self.lock = threading.RLock()
        self.draining = False
        self.failure: str | None = None
        self.forgotten: dict[str, Future[None]] = {}  # by digest; done when nothing is left of it
        self._max_waiting = max_waiting
        self._waiting = 0  # sequences that were submitted and not yet admitted

    def check(self, ref: AdapterRef | None) -> None:
        """Raises EngineFailed, Draining or AdapterNotFound."""
        with self.lock:
            if self.failure is not None:
                raise EngineFailed(self.failure)
            if self.draining:
                raise Draining("the server is stopping and takes no new requests")
            if ref is not None and ref.digest in self.forgotten:
                raise AdapterNotFound(ref.name)

    def enter(self, ref: AdapterRef | None, sequences: int) -> None:
        """So many more wait. Raises what `check` does, or Overloaded."""
        with self.lock:
            self.check(ref)
            if self._waiting + sequences > self._max_waiting:
                raise Overloaded(
                    f"{self._waiting} sequences wait already, {self._max_waiting} may",
                    retry_after=1.0,
                )
            self._waiting += sequences

    def leave_queue(self) -> None:
        """One that waited was admitted, or ended."""
        with self.lock:
            self._waiting -= 1

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
