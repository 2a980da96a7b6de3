"""Store → host cache → slots: where each adapter is, and how it gets to where it is needed.

The engine's thread asks (`acquire`) and is never made to wait: a cold adapter is fetched and
lowered by a worker thread, and the engine asks again when it has arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from adapters.delta import LoweredAdapter
from service.engine.observer import Observer
from service.engine.request import AdapterKey, AdapterRef
from service.residency.host_cache import HostCache
from service.residency.slots import Slots

Fetch = Callable[[AdapterRef], LoweredAdapter]  # store → lowered, in a worker thread
Post = Callable[[Callable[[], None]], None]  # run this in the engine's thread, soon


@dataclass(frozen=True, slots=True)
class Resident:
    """Where one adapter is now."""

    digest: str
    placement: str
    merged_dtype: str  # "" when unmerged
    tier: str  # "slot" | "host"
    nbytes: int
    pinned: bool = False
    running: int = 0  # sequences that hold a reference
    hits: int = 0
    last_used: float = 0.0  # seconds since the epoch


@dataclass(slots=True)
class _Load:
    ref: AdapterRef
    started: float
    future: Future[LoweredAdapter]


class Tiers:
    """Implements the scheduler's AdapterGate. Engine thread only, but for the worker's fetch."""

    def __init__(
        self,
        fetch: Fetch,
        post: Post,
        observer: Observer,
        *,
        left: Callable[[str], None],
        host_bytes: int,
        slot_bytes: int,
        device: torch.device,
        workers: int = 1,
    ) -> None:
        """`left` is told the digest of each adapter that has lost its slot."""
        self.host = HostCache(host_bytes)
        self.slots = Slots(slot_bytes)
        self._fetch = fetch
        self._post = post
        self._observer = observer
        self._left = left
        self._device = device
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="nibble-adapters")
        self._loads: dict[AdapterKey, _Load] = {}
        self._failures: dict[AdapterKey, str] = {}

    def acquire(self, ref: AdapterRef) -> bool:
        """A reference if the adapter is in a slot; else it is brought nearer, and False."""
        if ref.key not in self.slots and not self._place(ref):
            return False
        self.slots.acquire(ref.key)
        self._observer.adapter_hit(ref.name)
        return True

    def release(self, ref: AdapterRef) -> None:
        self.slots.release(ref.key)

    def adapter(self, key: AdapterKey) -> LoweredAdapter:
        """The adapter in its slot. Raises KeyError when it has none: never another one instead."""
        return self.slots[key].adapter

    def take_failures(self) -> dict[AdapterKey, str]:
        """Loads that failed since the last call, with the reason."""
        failures, self._failures = self._failures, {}
        return failures

    def pin(self, ref: AdapterRef, pinned: bool) -> None:
        """Keep the slot, or let it go when it is needed. Raises KeyError when there is none."""
        self.slots[ref.key].pinned = pinned

    def forget(self, digest: str) -> None:
        """Drop the adapter from both tiers; the caller has drained its sequences."""
        for key, _ in self.slots.items():
            if key.digest == digest:
                self.slots.deallocate(key)
                self._lost_slot(digest)
        for key, _ in self.host.items():
            if key.digest == digest:
                self.host.drop(key)
                self._observer.adapter_evicted(digest, "host")
        for key in [key for key in self._loads if key.digest == digest]:
            self._loads.pop(key).future.cancel()

    def residents(self) -> list[Resident]:
        """All adapters in a tier, those in slots first."""
        placed = [
            Resident(*key, "slot", s.nbytes, s.pinned, s.references, s.hits, s.last_used)
            for key, s in self.slots.items()
        ]
        cached = [
            Resident(*key, "host", a.nbytes)
            for key, a in self.host.items()
            if key not in self.slots
        ]
        return placed + cached

    def close(self) -> None:
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _place(self, ref: AdapterRef) -> bool:
        """Give the adapter a slot if it is in the host cache and one can be had."""
        adapter = self.host.get(ref.key)
        if adapter is None:
            self._load(ref)
            return False
        return self._allocate(ref, adapter)

    def _allocate(self, ref: AdapterRef, adapter: LoweredAdapter) -> bool:
        if adapter.nbytes > self.slots.budget:
            self._failures[ref.key] = (
                f"adapter {ref.name!r} needs {adapter.nbytes} bytes, "
                f"all slots together have {self.slots.budget}"
            )
            return False
        if not self.slots.can_allocate(adapter.nbytes):
            return False
        for evicted in self.slots.allocate(ref.key, adapter.to(self._device)):
            self._lost_slot(evicted.digest)
        return True

    def _lost_slot(self, digest: str) -> None:
        self._left(digest)
        self._observer.adapter_evicted(digest, "slot")

    def _load(self, ref: AdapterRef) -> None:
        if ref.key in self._loads or ref.key in self._failures:
            return
        future = self._workers.submit(self._fetch, ref)
        self._loads[ref.key] = _Load(ref, time.perf_counter(), future)
        future.add_done_callback(lambda done: self._post(lambda: self._arrived(ref, done)))

    def _arrived(self, ref: AdapterRef, future: Future[LoweredAdapter]) -> None:
        load = self._loads.get(ref.key)
        if load is None or load.future is not future:
            return  # forgotten meanwhile
        del self._loads[ref.key]
        error = future.exception()
        if error is not None:
            self._failures[ref.key] = f"adapter {ref.name!r} could not be loaded: {error}"
            return
        adapter = future.result()
        for evicted in self.host.put(ref.key, adapter.to(torch.device("cpu"))):
            self._observer.adapter_evicted(evicted.digest, "host")
        seconds = time.perf_counter() - load.started
        self._observer.adapter_loaded(ref.name, seconds, adapter.nbytes)
        if ref.key not in self.slots:
            self._allocate(ref, adapter)
