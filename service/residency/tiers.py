"""Store → host cache → slots: where each adapter is, and how it gets to where it is needed.

The engine's thread asks (`acquire`) and is never made to wait: a cold adapter is fetched and
lowered by worker threads, while steps run, and the engine asks again when it has arrived. A load
begins when a request is accepted (`prefetch`), before its prompt is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Literal, NamedTuple

import torch

from adapters.delta import LoweredAdapter
from service.engine.observer import Observer
from service.engine.request import AdapterKey, AdapterRef
from service.errors import Overloaded
from service.residency.claims import Claims
from service.residency.host_cache import HostCache
from service.residency.ledger import Footprint, footprint
from service.residency.loads import Fetch, Load, Loads
from service.residency.slots import Slots

__all__ = ["Fetch", "LoadReport", "Resident", "Tier", "Tiers"]

Tier = Literal["slot", "host", "loading", "store"]
Post = Callable[[Callable[[], None]], None]  # run this in the engine's thread, soon


class Resident(NamedTuple):
    """Where one adapter is now, and how often it was used since the server started."""

    digest: str
    placement: str
    merged_dtype: str  # "" when unmerged
    tier: Tier
    nbytes: int  # in memory; what it shares with others counts for each
    pinned: bool = False
    running: int = 0  # sequences that hold a reference
    hits: int = 0  # sequences that were admitted with it
    last_used: float = 0.0  # seconds since the epoch; 0: never


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What bringing an adapter to its slot cost."""

    digest: str
    placement: str
    nbytes: int
    seconds: float
    notes: dict[str, float]


@dataclass(slots=True)
class _Use:
    hits: int = 0
    last: float = 0.0
    loaded: bool = field(default=False)  # from the store, and by nobody used since


class Tiers:
    """Implements the scheduler's AdapterGate. Engine thread only, but for `prefetch`, `claims` and
    the workers' fetches."""

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
        max_loads: int = 64,
        workers: int = 2,
    ) -> None:
        """`left` is told the digest of each adapter that has lost its slot."""
        self.claims = Claims()
        self.host = HostCache(host_bytes)
        self.slots = Slots(slot_bytes)
        self.loads = Loads(
            fetch,
            lambda load: post(partial(self._arrived, load)),
            self.claims,
            most=max_loads,
            workers=workers,
            on_cpu=device.type == "cpu",
        )
        self._observer = observer
        self._left = left
        self._device = device
        self._uses: dict[AdapterKey, _Use] = {}
        self._failures: dict[AdapterKey, str] = {}

    # From any thread.

    def prefetch(self, ref: AdapterRef) -> None:
        """A request for the adapter is accepted: begin the load that it will wait for, if any.

        Raises Overloaded where too many loads are under way. What another thread sees of the tiers
        may be old by a moment: then the engine asks again, or a load finds its work done.
        """
        if ref.key in self.slots or ref.key in self.host:
            return
        try:
            self.loads.ask(ref, bounded=True)
        except Overloaded:
            self._observer.adapter_refused(ref.name)
            raise

    # The scheduler's gate.

    def acquire(self, ref: AdapterRef) -> bool:
        """A reference if the adapter is in a slot; else it is brought nearer, and False."""
        if ref.key not in self.slots and not self._place(ref):
            return False
        if self.slots[ref.key].leaving:
            return False
        self.slots.acquire(ref.key)
        use = self._uses.setdefault(ref.key, _Use())
        use.hits, use.last, use.loaded = use.hits + 1, time.time(), False
        return True

    def release(self, ref: AdapterRef) -> None:
        self.slots.release(ref.key)

    def resident(self, ref: AdapterRef) -> bool:
        return ref.key in self.slots and not self.slots[ref.key].leaving

    def make_way(self, refs: Sequence[AdapterRef]) -> None:
        """Let slots run empty for the first of these that is only short of one."""
        here = [r.key for r in refs if r.key in self.host and r.key not in self.slots]
        cached = (self.host.prints(key) for key in here)
        short = (prints for prints in cached if not self.slots.can_allocate(prints))
        self.slots.empty_for(next(short, None))

    # The engine.

    def seek(self, ref: AdapterRef) -> None:
        """A sequence comes that will want the adapter: count where it is found."""
        use = self._uses.setdefault(ref.key, _Use())
        tier: Tier = "store"
        if not use.loaded:
            tier = "slot" if ref.key in self.slots else "host" if ref.key in self.host else "store"
        self._observer.adapter_sought(ref.name, tier)

    def adapter(self, key: AdapterKey) -> LoweredAdapter:
        """The adapter in its slot. Raises KeyError when it has none: never another one instead."""
        return self.slots[key].adapter

    def take_failures(self) -> dict[AdapterKey, str]:
        """Loads that failed since the last call, with the reason."""
        failures, self._failures = self._failures, {}
        return failures

    def pin(self, ref: AdapterRef, pinned: bool) -> None:
        """Keep the slot, or let it go when it is needed. Raises KeyError when there is none."""
        self.slots.pin(ref.key, pinned)

    def forget(self, digest: str) -> None:
        """Drop the adapter from all tiers; the caller has drained its sequences."""
        for key, _ in self.slots.items():
            if key.digest == digest:
                self.slots.deallocate(key)
                self._lost_slot(key)
        for key, _ in self.host.items():
            if key.digest == digest:
                self.host.drop(key)
                self._observer.adapter_evicted(digest, "host")
        self.loads.forget(digest)
        for key in [key for key in self._uses if key.digest == digest]:
            del self._uses[key]

    def residents(self, digest: str | None = None) -> list[Resident]:
        """All adapters by tier, or those of one digest: those in slots, in the host cache alone,
        under way, and those that were used and are only in the store again."""
        loading = [key for key, _ in self.loads.items()]
        held = (key for key, _ in chain(self.slots.items(), self.host.items()))
        known = chain(held, loading, self._uses)
        keys = dict.fromkeys(key for key in known if digest in (None, key.digest))
        on_way = frozenset(loading)
        return [self._resident(key, on_way) for key in keys]

    def tally(self) -> dict[str, tuple[int, int]]:
        """Adapters in memory or on their way there, and their bytes: what costs nothing to ask
        often, however many were ever used."""
        slots = [slot.nbytes for _, slot in self.slots.items()]
        host = [nbytes for key, nbytes in self.host.items() if key not in self.slots]
        loading = sum(k not in self.slots and k not in self.host for k, _ in self.loads.items())
        return {
            "slot": (len(slots), sum(slots)),
            "host": (len(host), sum(host)),
            "loading": (loading, 0),
        }

    def _resident(self, key: AdapterKey, loading: Container[AdapterKey]) -> Resident:
        use = self._uses.get(key)
        used = (use.hits, use.last) if use else (0, 0.0)
        if key in self.slots:
            slot = self.slots[key]
            return Resident(*key, "slot", slot.nbytes, slot.pinned, slot.references, *used)
        if key in self.host:
            return Resident(*key, "host", self.host.nbytes(key), False, 0, *used)
        return Resident(*key, "loading" if key in loading else "store", 0, False, 0, *used)

    def close(self) -> None:
        self.loads.close()

    def check_integrity(self) -> None:
        self.slots.check_integrity()
        self.host.check_integrity()

    def _place(self, ref: AdapterRef) -> bool:
        """Give the adapter a slot if it is in the host cache and one can be had."""
        adapter = self.host.get(ref.key)
        if adapter is None:
            if ref.key not in self._failures:
                self.loads.ask(ref)
            return False
        prints = self.host.prints(ref.key)
        if self.slots.can_allocate(prints):
            return self._allocate(ref, adapter)
        self._check_possible(ref, prints)
        return False

    def _check_possible(self, ref: AdapterRef, prints: Footprint) -> None:
        """Its requests fail where it could have no slot even if nobody ran."""
        needed, budget = sum(prints.values()), self.slots.budget
        pinned = self.slots.pinned_bytes()
        if needed > budget:
            self._failures[ref.key] = (
                f"adapter {ref.name!r} needs {needed} bytes, all slots together have {budget}"
            )
        elif needed > budget - pinned:
            self._failures[ref.key] = (
                f"adapter {ref.name!r} needs {needed} bytes of the {budget} that all slots have, "
                f"and pinned adapters keep {pinned}: unpin one"
            )

    def _allocate(self, ref: AdapterRef, adapter: LoweredAdapter, *, spare: bool = False) -> bool:
        """A slot, if one can be had; `spare`: not at the cost of others that are claimed."""
        placed = adapter.to(self._device)
        for evicted in self.slots.evict_for(placed, self.claims, spare=spare):
            self._lost_slot(evicted)
        return self.slots.allocate(ref.key, placed)

    def _lost_slot(self, key: AdapterKey) -> None:
        self._left(key.digest)
        self._observer.adapter_evicted(key.digest, "slot")

    def _arrived(self, load: Load) -> None:
        """A load has ended. The adapter may be in a slot already when it came by another road."""
        ref = load.ref
        if not self.loads.take(load):
            return  # forgotten meanwhile
        if load.error is not None:
            self._failures[ref.key] = f"adapter {ref.name!r} could not be loaded: {load.error}"
            self._observer.adapter_failed(ref.name)
        if load.adapter is None or load.cached is None:
            return
        for evicted in self.host.put(ref.key, load.cached, self.claims):
            self._observer.adapter_evicted(evicted.digest, "host")
        self._uses.setdefault(ref.key, _Use()).loaded = True
        seconds, queued = load.ended - load.asked, load.begun - load.asked
        self._observer.adapter_loaded(ref.key, seconds, load.cached.nbytes, queued)
        if ref.key not in self.slots and self.slots.can_allocate(footprint(load.adapter)):
            self._allocate(ref, load.adapter, spare=True)
