"""Lowered adapters in main memory, under a byte budget: the tier between store and slots."""

from __future__ import annotations

from collections import OrderedDict

from adapters.delta import LoweredAdapter
from service.engine.request import AdapterKey


class HostCache:
    """Least recently used out first. On the CPU a slot shares its tensors with this cache."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.allocated = 0
        self._adapters: OrderedDict[AdapterKey, LoweredAdapter] = OrderedDict()

    def get(self, key: AdapterKey) -> LoweredAdapter | None:
        adapter = self._adapters.get(key)
        if adapter is not None:
            self._adapters.move_to_end(key)
        return adapter

    def put(self, key: AdapterKey, adapter: LoweredAdapter) -> list[AdapterKey]:
        """Keep the adapter if it fits at all; returns the keys that left for it."""
        self.drop(key)
        if adapter.nbytes > self.budget:
            return []
        evicted = []
        while self.allocated + adapter.nbytes > self.budget:
            oldest = next(iter(self._adapters))
            self.drop(oldest)
            evicted.append(oldest)
        self._adapters[key] = adapter
        self.allocated += adapter.nbytes
        return evicted

    def drop(self, key: AdapterKey) -> None:
        adapter = self._adapters.pop(key, None)
        if adapter is not None:
            self.allocated -= adapter.nbytes

    def items(self) -> list[tuple[AdapterKey, LoweredAdapter]]:
        return list(self._adapters.items())
