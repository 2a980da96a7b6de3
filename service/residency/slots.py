"""The device places of adapters, under a byte budget. Engine thread only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field

from adapters.delta import LoweredAdapter
from service.engine.request import AdapterKey
from service.residency.ledger import Footprint, Ledger, footprint


@dataclass(slots=True)
class Slot:
    """One adapter on the device, and who needs it."""

    adapter: LoweredAdapter
    prints: Footprint
    references: int = 0  # sequences that were admitted with it
    pinned: bool = False
    leaving: bool = False  # gets no new references: another one waits for the place
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(self.prints.values())

    @property
    def evictable(self) -> bool:
        return self.references == 0 and not self.pinned


class Slots:
    """Bytes are those of distinct tensors. The least recently used slot that nobody needs goes
    first; what it shares with another stays for the other."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._all = Ledger()
        self._needed = Ledger()  # of slots that are not evictable
        self._slots: OrderedDict[AdapterKey, Slot] = OrderedDict()  # least recently used first

    @property
    def allocated(self) -> int:
        return self._all.total

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._slots

    def __getitem__(self, key: AdapterKey) -> Slot:
        return self._slots[key]

    def items(self) -> list[tuple[AdapterKey, Slot]]:
        return list(self._slots.items())

    def can_allocate(self, prints: Footprint) -> bool:
        """Is there room, or can it be made by eviction?"""
        return self._lacking(prints) <= 0

    def evict_for(
        self, adapter: LoweredAdapter, claimed: Container[AdapterKey] = (), *, spare: bool = False
    ) -> list[AdapterKey]:
        """Make room, as far as it can be had; returns the keys that left, those that nobody has
        `claimed` before the others. `spare`: the others stay."""
        prints = footprint(adapter)
        evicted = []
        for key in sorted(self._slots, key=lambda one: one in claimed):
            if self._fits(prints) or (spare and key in claimed):
                break
            if self._slots[key].evictable:
                self.deallocate(key)
                evicted.append(key)
        return evicted

    def allocate(self, key: AdapterKey, adapter: LoweredAdapter) -> bool:
        """Give the adapter a slot, if there is room."""
        assert key not in self._slots
        prints = footprint(adapter)
        if not self._fits(prints):
            return False
        self._slots[key] = Slot(adapter, prints)
        self._all.add(prints)
        return True

    def deallocate(self, key: AdapterKey) -> None:
        slot = self._slots[key]
        assert slot.references == 0, f"slot of {key} is freed while {slot.references} use it"
        self.pin(key, False)
        del self._slots[key]
        self._all.remove(slot.prints)

    def acquire(self, key: AdapterKey) -> None:
        slot = self._slots[key]
        if slot.evictable:
            self._needed.add(slot.prints)
        slot.references += 1
        self._slots.move_to_end(key)

    def release(self, key: AdapterKey) -> None:
        slot = self._slots[key]
        assert slot.references > 0, f"slot of {key} was released twice"
        slot.references -= 1
        if slot.evictable:
            self._needed.remove(slot.prints)

    def pin(self, key: AdapterKey, pinned: bool) -> None:
        """Raises KeyError when there is no such slot."""
        slot = self._slots[key]
        before, slot.pinned = slot.evictable, pinned
        if before and not slot.evictable:
            self._needed.add(slot.prints)
        elif slot.evictable and not before:
            self._needed.remove(slot.prints)

    def pinned_bytes(self) -> int:
        return sum(slot.nbytes for slot in self._slots.values() if slot.pinned)

    def empty_for(self, prints: Footprint | None) -> None:
        """Mark as leaving the slots in the way of `prints`, those of fewest references first, and
        no others; None: none."""
        for slot in self._slots.values():
            slot.leaving = False
        lacking = self._lacking(prints) if prints else 0
        used = [s for s in self._slots.values() if s.references and not s.pinned]
        for slot in sorted(used, key=lambda s: s.references):
            if lacking <= 0:
                break
            slot.leaving = True
            lacking -= slot.nbytes

    def _fits(self, prints: Footprint) -> bool:
        return self._all.total + self._all.beyond(prints) <= self.budget

    def _lacking(self, prints: Footprint) -> int:
        """Bytes by which what cannot be evicted and `prints` exceed the budget."""
        return self._needed.total + self._needed.beyond(prints) - self.budget

    def check_integrity(self) -> None:
        """Raise AssertionError when bytes are lost or counted twice."""
        for ledger, slots in (
            (self._all, list(self._slots.values())),
            (self._needed, [slot for slot in self._slots.values() if not slot.evictable]),
        ):
            held: dict[int, int] = {}
            for slot in slots:
                held |= slot.prints
            assert ledger.total == sum(held.values())
        assert self.allocated <= self.budget
        assert all(slot.references >= 0 for slot in self._slots.values())
