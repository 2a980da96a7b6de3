"""The device places of adapters, under a byte budget. Engine thread only."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from adapters.delta import LoweredAdapter
from service.engine.request import AdapterKey


@dataclass(slots=True)
class Slot:
    """One adapter on the device, and who needs it."""

    adapter: LoweredAdapter
    nbytes: int
    references: int = 0  # sequences that were admitted with it
    pinned: bool = False
    hits: int = 0
    last_used: float = field(default_factory=time.time)

    @property
    def evictable(self) -> bool:
        return self.references == 0 and not self.pinned


class Slots:
    """allocated + free = budget. The least recently used slot that nobody needs goes first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.allocated = 0
        self._slots: OrderedDict[AdapterKey, Slot] = OrderedDict()  # least recently used first

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._slots

    def __getitem__(self, key: AdapterKey) -> Slot:
        return self._slots[key]

    def items(self) -> list[tuple[AdapterKey, Slot]]:
        return list(self._slots.items())

    def can_allocate(self, nbytes: int) -> bool:
        evictable = sum(slot.nbytes for slot in self._slots.values() if slot.evictable)
        return nbytes <= self.budget - self.allocated + evictable

    def allocate(self, key: AdapterKey, adapter: LoweredAdapter) -> list[AdapterKey]:
        """Give the adapter a slot; returns the keys that were evicted for it."""
        nbytes = adapter.nbytes
        assert key not in self._slots
        assert self.can_allocate(nbytes)
        evicted = []
        for other, slot in self.items():
            if self.allocated + nbytes <= self.budget:
                break
            if slot.evictable:
                self.deallocate(other)
                evicted.append(other)
        self._slots[key] = Slot(adapter, nbytes)
        self.allocated += nbytes
        return evicted

    def deallocate(self, key: AdapterKey) -> None:
        slot = self._slots[key]
        assert slot.references == 0, f"slot of {key} is freed while {slot.references} use it"
        del self._slots[key]
        self.allocated -= slot.nbytes

    def acquire(self, key: AdapterKey) -> None:
        slot = self._slots[key]
        slot.references += 1
        slot.hits += 1
        slot.last_used = time.time()
        self._slots.move_to_end(key)

    def release(self, key: AdapterKey) -> None:
        slot = self._slots[key]
        assert slot.references > 0, f"slot of {key} was released twice"
        slot.references -= 1

    def check_integrity(self) -> None:
        """Raise AssertionError when bytes are lost or counted twice."""
        assert self.allocated == sum(slot.nbytes for slot in self._slots.values())
        assert 0 <= self.allocated <= self.budget
        assert all(slot.references >= 0 for slot in self._slots.values())
