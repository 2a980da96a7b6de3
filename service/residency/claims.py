"""Which adapters accepted requests still need: from the moment they are accepted to their end."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from service.engine.request import AdapterKey, AdapterRef


class Claims:
    """Counted by adapter; any thread may take and drop.

    What is claimed stays in the store until it is dropped, leaves the tiers after all others, and
    a load that nobody claims any more is not begun.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: Counter[AdapterKey] = Counter()
        self._digests: Counter[str] = Counter()

    def take(self, ref: AdapterRef, times: int = 1) -> None:
        with self._lock:
            self._keys[ref.key] += times
            for digest in _digests(ref):
                self._digests[digest] += times

    def drop(self, ref: AdapterRef) -> None:
        with self._lock:
            assert self._keys[ref.key] > 0, f"a claim on {ref.name!r} was dropped twice"
            _less(self._keys, ref.key)
            for digest in _digests(ref):
                _less(self._digests, digest)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def needs(self, digest: str) -> bool:
        """Does anybody need anything that is made of this digest?"""
        return digest in self._digests


def _digests(ref: AdapterRef) -> set[str]:
    """The digest of the adapter, and of each part where it is a sum."""
    return {ref.digest, *(digest for digest, _ in ref.parts)}


def _less(counts: Counter[Any], key: object) -> None:
    counts[key] -= 1
    if counts[key] == 0:
        del counts[key]
