"""The operator for steps that are captured: whose rows they are stands in tensors alone.

Each adapter of a step takes a slot of a table of terms, by linear layer; the step's tiles say which
rows are of which slot. An adapter whose deltas are more than one low-rank term, scale and bias for
each linear layer cannot be told so: steps that it is in are not captured.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapters.delta import LoweredAdapter
from base.kernels import MOST_ROWS, LowRank, SlotPlan, SlotTable, slot_serves

from .layer import OperatorContext
from .linear import AdaptedLinear, LinearPlan
from .segments import Segments

Tile = tuple[int, int, int]  # first row, stop row, slot


@dataclass(slots=True)
class _Known:
    adapter: LoweredAdapter
    terms: Mapping[int, LowRank] | None  # by place; None: more than a slot can say
    slot: int | None = None


class SlottedOperator:
    """Slots for the adapters of a step, at least as many as it has rows; the least recently used
    is given away."""

    def __init__(self, context: OperatorContext, slots: int, device: torch.device) -> None:
        self._context = context
        linears = [path for path, it in context.layers.items() if isinstance(it, AdaptedLinear)]
        self._places = {path: place for place, path in enumerate(linears)}
        self._table = SlotTable(slots, len(linears), device)
        self._free = list(range(slots))
        self._known: OrderedDict[int, _Known] = OrderedDict()  # by id, least recently used first

    def plans(self, tiles: torch.Tensor, rows: int) -> dict[str, LinearPlan]:
        """Module path -> plan of a step of `rows` rows whose tiles [.., 3] will stand here."""
        return {
            path: LinearPlan(rows, SlotPlan(self._table, place, tiles), (), (), (), (), ())
            for path, place in self._places.items()
        }

    def takes(self, segments: Segments) -> bool:
        """Can all adapters of this step be told by slots?"""
        adapters = [segment.adapter for segment in segments if segment.adapter is not None]
        return all(self._of(adapter).terms is not None for adapter in adapters)

    def tiles_of(self, segments: Segments) -> list[Tile]:
        """The tiles of a step that it `takes`, at most one a row; its adapters have slots then."""
        tiles = []
        for segment in segments:
            if segment.adapter is not None:
                slot = self._slot_of(segment.adapter)
                for start in range(segment.start, segment.stop, MOST_ROWS):
                    tiles.append((start, min(start + MOST_ROWS, segment.stop), slot))
        return tiles

    def forget(self, digest: str) -> None:
        """Nothing of this adapter is needed any more; it must not be in the running step."""
        for key in [key for key, it in self._known.items() if it.adapter.digest == digest]:
            slot = self._known.pop(key).slot
            if slot is not None:
                self._table.clear(slot)
                self._free.append(slot)

    def _of(self, adapter: LoweredAdapter) -> _Known:
        known = self._known.get(id(adapter))
        if known is None:
            terms = self._told(self._context.parts_of(adapter))
            known = self._known[id(adapter)] = _Known(adapter, terms)
        return known

    def _slot_of(self, adapter: LoweredAdapter) -> int:
        known = self._of(adapter)
        self._known.move_to_end(id(adapter))  # so that none of this step is given away in it
        if known.slot is None:
            if not self._free:
                self._free.append(self._given_away())
            known.slot = self._free.pop()
            self._table.put(known.slot, known.terms or {})
        return known.slot

    def _given_away(self) -> int:
        oldest = next(known for known in self._known.values() if known.slot is not None)
        slot, oldest.slot = oldest.slot, None
        assert slot is not None
        return slot

    def _told(self, parts: Mapping[str, Any]) -> Mapping[int, LowRank] | None:
        terms: dict[int, LowRank] = {}
        for path, part in parts.items():
            layer = self._context.layers[path]
            own = layer.only_term(part) if isinstance(layer, AdaptedLinear) else None
            if own is None or not slot_serves(own):
                return None
            terms[self._places[path]] = own
        return terms
