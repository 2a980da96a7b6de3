"""Lowered adapters in main memory, under a byte budget: the tier between store and slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field

from adapters.delta import LoweredAdapter
from service.engine.request import AdapterKey
from service.residency.ledger import Footprint, Ledger, footprint


@dataclass(slots=True)
class _Entry:
    adapter: LoweredAdapter
    prints: Footprint
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(self.prints.values())


class HostCache:
    """Least recently used out first. On the CPU a slot shares its tensors with this cache."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._ledger = Ledger()
        self._entries: OrderedDict[AdapterKey, _Entry] = OrderedDict()

    @property
    def allocated(self) -> int:
        return self._ledger.total

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._entries

    def get(self, key: AdapterKey) -> LoweredAdapter | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry.adapter

    def prints(self, key: AdapterKey) -> Footprint:
        return self._entries[key].prints

    def nbytes(self, key: AdapterKey) -> int:
        return self._entries[key].nbytes

    def put(
        self, key: AdapterKey, adapter: LoweredAdapter, claimed: Container[AdapterKey] = ()
    ) -> list[AdapterKey]:
        """Keep the adapter if it fits at all; returns the keys that left for it, those that nobody
        has `claimed` before the others."""
        self.drop(key)
        prints = footprint(adapter)
        if sum(prints.values()) > self.budget:
            return []
        evicted = []
        for other in sorted(self._entries, key=lambda one: one in claimed):
            if self._ledger.total + self._ledger.beyond(prints) <= self.budget:
                break
            self.drop(other)
            evicted.append(other)
        self._entries[key] = _Entry(adapter, prints)
        self._ledger.add(prints)
        return evicted

    def drop(self, key: AdapterKey) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._ledger.remove(entry.prints)

    def items(self) -> list[tuple[AdapterKey, int]]:
        """With their bytes."""
        return [(key, entry.nbytes) for key, entry in self._entries.items()]

    def check_integrity(self) -> None:
        """Raise AssertionError when bytes are lost or counted twice."""
        held: dict[int, int] = {}
        for entry in self._entries.values():
            held |= entry.prints
        assert self._ledger.total == sum(held.values()) <= self.budget
