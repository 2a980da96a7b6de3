"""From the store to what the operator reads, in whatever thread asks."""

from __future__ import annotations

from adapters.delta import LoweredAdapter
from adapters.lowering import lower
from adapters.lowering.composed import compose
from adapters.store import AdapterStore
from base.load import Base
from service.engine.request import AdapterRef


class Fetch:
    """Lowers the adapter that a reference is pinned to; the parts of a sum one after the other."""

    def __init__(self, store: AdapterStore, base: Base) -> None:
        self._store = store
        self._base = base

    def __call__(self, ref: AdapterRef) -> LoweredAdapter:
        """Raises AdapterNotFound, StoreUnavailable, InvalidAdapter."""
        if not ref.parts:
            return self._lowered(ref)
        parts = [(self._lowered(AdapterRef(digest, ref.name)), w) for digest, w in ref.parts]
        return compose(ref.digest, parts, self._base)

    def _lowered(self, ref: AdapterRef) -> LoweredAdapter:
        manifest = self._store.pinned(ref.digest)
        return lower(
            manifest,
            self._store.weights_path(manifest),
            self._base,
            placement=ref.placement,
            merged_dtype=ref.merged_dtype,
        )
