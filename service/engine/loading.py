"""Adapters by order of an operator, or of a request that is being prepared: load, pin, forget.

What requests need by themselves the scheduler asks of the tiers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager

from adapters.delta import LoweredAdapter
from service.engine.door import Door
from service.engine.mailbox import Mailbox
from service.engine.request import AdapterKey, AdapterRef
from service.errors import AdapterLoadFailed, EngineFailed
from service.residency.tiers import LoadReport, Resident, Tiers


class Loading:
    """See `Engine` for who may call what."""

    def __init__(self, tiers: Tiers, mailbox: Mailbox, door: Door) -> None:
        self._tiers = tiers
        self._mailbox = mailbox
        self._door = door
        self._wanted: list[tuple[AdapterRef, Future[LoweredAdapter]]] = []

    # From any thread.

    @contextmanager
    def reserved(self, ref: AdapterRef | None) -> Iterator[None]:
        """Within it the adapter is on its way to memory, and its file stays in the store. A request
        that is still being prepared reserves; one that was submitted is safe by itself.

        Raises AdapterNotFound, or Overloaded where too many other adapters are being loaded.
        """
        if ref is None:
            yield
            return
        with self._door.lock:
            self._door.check(ref)
            self._tiers.claims.take(ref)
        try:
            self._tiers.prefetch(ref)
            yield
        finally:
            self._tiers.claims.drop(ref)
            if self._door.forgotten:
                self._mailbox.wake()  # for who waits for the last claim

    def load(self, ref: AdapterRef, timeout: float) -> LoadReport:
        """Bring the adapter to a slot and say what it cost. Raises AdapterLoadFailed, and what
        `reserved` raises."""
        started = time.monotonic()
        done: Future[LoweredAdapter] = Future()
        try:
            with self.reserved(ref):
                self._mailbox.post(lambda: self._wanted.append((ref, done)))
                adapter = self._mailbox.wait(done, timeout)
        except TimeoutError:
            done.cancel()
            raise AdapterLoadFailed(
                f"adapter {ref.name!r} found no free slot within {timeout:.0f} s: "
                "unpin or unload another one"
            ) from None
        seconds = time.monotonic() - started
        return LoadReport(ref.digest, ref.placement, adapter.nbytes, seconds, dict(adapter.notes))

    def pin(self, ref: AdapterRef, pinned: bool) -> None:
        """Raises KeyError when it is to be let go and has no slot."""
        self._mailbox.ask(lambda: self._tiers.pin(ref, pinned))

    def forget(self, digest: str) -> None:
        """Let nobody in for the digest, and return when nothing is left of it."""
        done = self._door.forget(digest)
        self._mailbox.wake()
        self._mailbox.wait(done)

    def residents(self, digest: str | None = None) -> list[Resident]:
        return self._mailbox.ask(lambda: self._tiers.residents(digest))

    def tally(self) -> dict[str, tuple[int, int]]:
        return self._mailbox.ask(self._tiers.tally)

    # The engine's thread.

    @property
    def waits(self) -> bool:
        """Somebody waits for an adapter to reach its slot."""
        return bool(self._wanted)

    def answer(self, failures: Mapping[AdapterKey, str]) -> None:
        """Callers of `load` whose adapter has arrived in its slot, or never will."""
        pending = []
        for ref, done in self._wanted:
            if done.cancelled():
                continue
            if ref.key in failures:
                done.set_exception(AdapterLoadFailed(failures[ref.key]))
            elif self._tiers.acquire(ref):
                self._tiers.release(ref)
                done.set_result(self._tiers.adapter(ref.key))
            else:
                pending.append((ref, done))
        self._wanted = pending

    def forget_drained(self, forget: Callable[[str], object]) -> None:
        """Drop what nobody claims any more of those that are to be forgotten; `forget` drops the
        rest of a digest."""
        if not self._door.forgotten:
            return
        with self._door.lock:
            ready = [d for d in self._door.forgotten if not self._tiers.claims.needs(d)]
        for digest in ready:
            self._tiers.forget(digest)
            forget(digest)
            with self._door.lock:
                done = self._door.forgotten.pop(digest)
            done.set_result(None)

    def end(self) -> None:
        """The engine stops: nobody waits for ever."""
        with self._door.lock:
            unanswered: list[Future[None]] = list(self._door.forgotten.values())
        for done in unanswered + [done for _, done in self._wanted]:
            if not done.done():
                done.set_exception(EngineFailed("the engine has stopped"))
