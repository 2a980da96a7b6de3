"""What adapters add to the layers, by number: tables on the device that a captured step reads.

A CUDA graph repeats its launches with the arguments of their capture. So nothing here depends on
whose rows a step has: a slot of the table holds the addresses of one adapter's terms, and the
tiles, which every step writes anew, say which rows belong to which slot.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .lowrank import LowRank, LowRankPlan, Segment

FIELDS = 8  # a, b, d, gain, bias, rank, a is bfloat16, b is bfloat16; a record is 64 bytes
TILE = 3  # first row, stop row, slot
MOST_RANK = 256  # of a term: what the workspace of a captured step has room for
MOST_ROWS = 16  # of a tile


class SlotTable:
    """The terms of `slots` adapters at `places` layers; 0 stands for what a term does not have."""

    def __init__(self, slots: int, places: int, device: torch.device) -> None:
        self.records = torch.zeros(slots, places, FIELDS, dtype=torch.int64, device=device)
        self._held: list[Mapping[int, LowRank]] = [{}] * slots  # whose addresses these are

    def put(self, slot: int, terms: Mapping[int, LowRank]) -> None:
        """Make `slot` the adapter that has these terms, by place; those that `serves` takes."""
        records = torch.zeros(self.records.shape[1:], dtype=torch.int64)
        for place, term in terms.items():
            records[place] = torch.tensor(_record(term))
        self.records[slot].copy_(records)
        self._held[slot] = dict(terms)

    def clear(self, slot: int) -> None:
        """The slot is nobody's: let go of the tensors."""
        self.put(slot, {})


def serves(term: LowRank) -> bool:
    """Can a record say this term?"""
    return term.rank <= MOST_RANK and not term.rounded


def _record(term: LowRank) -> tuple[int, ...]:
    parts = (term.a, term.b, term.d, term.gain, term.bias)
    halves = (isinstance(f, Tensor) and f.dtype is torch.bfloat16 for f in (term.a, term.b))
    return (
        *(0 if part is None else part.data_ptr() for part in parts),
        *(term.rank, *(int(half) for half in halves)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class SlotPlan:
    """One layer of a step whose rows are told by tiles: y = gain * (y + B (d * (A x))) + bias.

    A tile is at most MOST_ROWS rows of one slot; no two have a row in common, and those whose rows
    end where they start are nobody's. Rows in no tile stay as they are.
    """

    table: SlotTable
    place: int
    tiles: Tensor  # [tiles, TILE] int32, on the table's device

    @property
    def records(self) -> Tensor:
        """[slots, FIELDS] of this layer."""
        return self.table.records[:, self.place]

    def resolved(self, outputs: int, width: int) -> LowRankPlan:
        """The same as a plan, from what tables and tiles hold now. On the CPU alone."""
        found = []
        for start, stop, slot in self.tiles.tolist():
            if start < stop:
                term = _term_at(self.records[slot].tolist(), outputs, width)
                found.append(Segment(start, stop, term))
        return LowRankPlan(found)


def _term_at(record: list[int], outputs: int, width: int) -> LowRank:
    a, b, d, gain, bias, rank, a_is_half, b_is_half = record
    kinds = [torch.bfloat16 if half else torch.float32 for half in (a_is_half, b_is_half)]
    b_rows = _at(b, (rank, outputs), kinds[1])
    return LowRank(
        _at(a, (rank, width), kinds[0]),
        None if b_rows is None else b_rows.t(),
        _at(d, (rank,)),
        _at(gain, (outputs,)),
        _at(bias, (outputs,)),
    )


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A view of this process's memory."""
    if not address:
        return None
    count = torch.Size(shape).numel()
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
