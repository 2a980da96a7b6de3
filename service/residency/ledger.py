"""Bytes of the tensors that adapters hold: one that several share counts once."""

from __future__ import annotations

from collections.abc import Mapping

from adapters.delta import LoweredAdapter

Footprint = Mapping[int, int]  # address of a storage -> its bytes


def footprint(adapter: LoweredAdapter) -> Footprint:
    """The distinct storages of an adapter; true for as long as the adapter is held."""
    storages = (tensor.untyped_storage() for tensor in adapter.tensors())
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class Ledger:
    """Counts holders of each storage. `total` is what all of them take in memory together."""

    def __init__(self) -> None:
        self.total = 0
        self._holders: dict[int, int] = {}

    def beyond(self, prints: Footprint) -> int:
        """Bytes that would be new."""
        return sum(nbytes for at, nbytes in prints.items() if at not in self._holders)

    def add(self, prints: Footprint) -> None:
        for at, nbytes in prints.items():
            held = self._holders.get(at, 0)
            self._holders[at] = held + 1
            self.total += 0 if held else nbytes

    def remove(self, prints: Footprint) -> None:
        """A storage is free when its last holder goes."""
        for at, nbytes in prints.items():
            self._holders[at] -= 1
            if self._holders[at] == 0:
                del self._holders[at]
                self.total -= nbytes
