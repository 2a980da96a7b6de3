"""The adapter operator on CUDA: one kernel shrinks all segments, one expands those apart.

For each segment of rows, as `LowRank` says: y = gain * (y + B (d * (A x))) + bias

- shrink: h[s] = A[:, split s] x[split s], partial sums in float32, for every split of the columns
- expand: y = gain * (y + B (d * Σ h[s])) + bias, in float32, rounded once to y's dtype

A split is SPLIT columns and a tile 16 rows of one segment, whatever the batch is, so that the
order of the additions of a row depends on the layer and the adapter alone. A term in bfloat16
meets x in bfloat16 on the matrix units; any other pair is widened to float32.
"""
# mypy: disable-error-code="no-untyped-def", allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lowrank import LowRankPlan, Segment
from .slots import MOST_RANK, MOST_ROWS, SlotPlan
from .triton_arithmetic import add_product, rounded

ROWS = MOST_ROWS  # of a tile: the least that the matrix units take
RANKS = 16  # of A and B at a time
COLUMNS = 64  # of A at a time
SPLIT = 1024  # columns whose partial sums one program makes
OUTPUTS = 64  # columns of y of one program
APART = 4  # programs that share the ranks of a tile, where its rank is not known before

_FIELDS = 11  # start, stop, a, b, d, gain, bias, rank, a is bfloat16, b is bfloat16, place in h


@triton.jit
def _inner(
    x,
    x_stride,
    rows,
    stop,
    ranks,
    rank,
    address,
    a_is_half,
    split,
    width,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A[ranks, split] x[rows, split]: [ROWS, RANKS]."""
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for first in range(split * SPLIT, min(split * SPLIT + SPLIT, width), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (rows < stop)[:, None] & (columns < width)[None, :]
        part = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
        places = ranks[None, :] * width + columns[:, None]
        inside = (ranks < rank)[None, :] & (columns < width)[:, None]
        if a_is_half:
            half = tl.load(
                address.to(tl.pointer_type(tl.bfloat16)) + places, mask=inside, other=0.0
            )
            total = add_product(total, part, half)
        else:
            full = tl.load(address.to(tl.pointer_type(tl.float32)) + places, mask=inside, other=0.0)
            total = add_product(total, part, full)
    return total


@triton.jit
def _outer(
    added,
    inner,
    ranks,
    rank,
    columns,
    outputs,
    b,
    d,
    b_is_half,
):
    """added + B[columns, ranks] (d * inner)."""
    if d != 0:
        scale = tl.load(d.to(tl.pointer_type(tl.float32)) + ranks, mask=ranks < rank, other=0.0)
        inner *= scale[None, :]
    places = ranks[:, None] * outputs + columns[None, :]
    inside = (ranks < rank)[:, None] & (columns < outputs)[None, :]
    if b_is_half:
        half = tl.load(b.to(tl.pointer_type(tl.bfloat16)) + places, mask=inside, other=0.0)
        added = add_product(added, inner, half)
    else:
        full = tl.load(b.to(tl.pointer_type(tl.float32)) + places, mask=inside, other=0.0)
        added = add_product(added, inner, full)
    return added


@triton.jit
def _finish(y, y_stride, rows, stop, columns, outputs, added, gain, bias):
    """y = gain * (y + added) + bias, rounded once."""
    inside = (rows < stop)[:, None] & (columns < outputs)[None, :]
    where = y + rows[:, None] * y_stride + columns[None, :]
    result = tl.load(where, mask=inside, other=0.0).to(tl.float32) + added
    within = columns < outputs
    if gain != 0:
        factor = tl.load(gain.to(tl.pointer_type(tl.float32)) + columns, mask=within, other=0.0)
        result *= factor[None, :]
    if bias != 0:
        shift = tl.load(bias.to(tl.pointer_type(tl.float32)) + columns, mask=within, other=0.0)
        result += shift[None, :]
    tl.store(where, rounded(result, y.dtype.element_ty), mask=inside)


@triton.jit
def _shrink(
    x,
    x_stride,
    h,
    segments,
    tiles,
    width,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    split = tl.program_id(1)
    record = segments + FIELDS * tl.load(tile)
    start, stop, rank = tl.load(record), tl.load(record + 1), tl.load(record + 7)
    address, a_is_half, place = tl.load(record + 2), tl.load(record + 8), tl.load(record + 10)
    rows = tl.load(tile + 1) + tl.arange(0, ROWS)
    ranks = tl.load(tile + 2) + tl.arange(0, RANKS)
    total = _inner(
        *(x, x_stride, rows, stop, ranks, rank, address, a_is_half, split, width),
        *(ROWS, RANKS, COLUMNS, SPLIT),
    )
    where = place + (split * (stop - start) + rows - start)[:, None] * rank + ranks[None, :]
    tl.store(h + where, total, mask=(rows < stop)[:, None] & (ranks < rank)[None, :])


@triton.jit
def _expand(
    y,
    y_stride,
    h,
    segments,
    tiles,
    outputs,
    splits,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tile = tiles + 2 * tl.program_id(0)
    record = segments + FIELDS * tl.load(tile)
    start, stop, rank = tl.load(record), tl.load(record + 1), tl.load(record + 7)
    b, d, gain = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
    bias, b_is_half, place = tl.load(record + 6), tl.load(record + 9), tl.load(record + 10)
    rows = tl.load(tile + 1) + tl.arange(0, ROWS)
    columns = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    added = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        inside = (rows < stop)[:, None] & (ranks < rank)[None, :]
        inner = tl.zeros((ROWS, RANKS), tl.float32)
        for split in range(splits):
            part = (split * (stop - start) + rows - start)[:, None] * rank + ranks[None, :]
            inner += tl.load(h + place + part, mask=inside, other=0.0)
        added = _outer(added, inner, ranks, rank, columns, outputs, b, d, b_is_half)
    _finish(y, y_stride, rows, stop, columns, outputs, added, gain, bias)


@triton.jit
def _shrink_slots(
    x,
    x_stride,
    h,
    records,
    slot_stride,
    tiles,
    width,
    splits,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    APART: tl.constexpr,
):
    """As `_shrink`, for rows told by tiles: h [rows, splits, MOST]."""
    tile = tiles + 3 * tl.program_id(0)
    split = tl.program_id(1)
    first, stop = tl.load(tile), tl.load(tile + 1)
    if first >= stop:
        return
    record = records + tl.load(tile + 2) * slot_stride
    address, rank, a_is_half = tl.load(record), tl.load(record + 5), tl.load(record + 6)
    rows = first + tl.arange(0, ROWS)
    for start in range(tl.program_id(2) * RANKS, rank, APART * RANKS):
        ranks = start + tl.arange(0, RANKS)
        total = _inner(
            *(x, x_stride, rows, stop, ranks, rank, address, a_is_half, split, width),
            *(ROWS, RANKS, COLUMNS, SPLIT),
        )
        where = (rows * splits + split)[:, None] * MOST + ranks[None, :]
        tl.store(h + where, total, mask=(rows < stop)[:, None] & (ranks < rank)[None, :])


@triton.jit
def _expand_slots(
    y,
    y_stride,
    h,
    records,
    slot_stride,
    tiles,
    outputs,
    splits,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """As `_expand`, for rows told by tiles."""
    tile = tiles + 3 * tl.program_id(0)
    first, stop = tl.load(tile), tl.load(tile + 1)
    if first >= stop:
        return
    record = records + tl.load(tile + 2) * slot_stride
    b, d, gain = tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    bias, rank, b_is_half = tl.load(record + 4), tl.load(record + 5), tl.load(record + 7)
    if (rank == 0) & (gain == 0) & (bias == 0):
        return
    rows = first + tl.arange(0, ROWS)
    columns = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    added = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        inside = (rows < stop)[:, None] & (ranks < rank)[None, :]
        inner = tl.zeros((ROWS, RANKS), tl.float32)
        for split in range(splits):
            part = (rows * splits + split)[:, None] * MOST + ranks[None, :]
            inner += tl.load(h + part, mask=inside, other=0.0)
        added = _outer(added, inner, ranks, rank, columns, outputs, b, d, b_is_half)
    _finish(y, y_stride, rows, stop, columns, outputs, added, gain, bias)


class _Layout:
    """A plan as the kernels read it, on its device. It holds addresses of the plan's tensors."""

    def __init__(self, plan: LowRankPlan, device: torch.device) -> None:
        live = [s for s in plan.segments if s.stop > s.start and s.term.device is not None]
        self.splits = -(-(plan.in_features or 0) // SPLIT)
        records, shrunk, place = [], [], 0
        for number, segment in enumerate(live):
            records.append(_record(segment, place))
            place += self.splits * (segment.stop - segment.start) * segment.term.rank
            shrunk += [
                (number, row, rank)
                for row in range(segment.start, segment.stop, ROWS)
                for rank in range(0, segment.term.rank, RANKS)
            ]
        self.workspace = place
        self.segments = torch.tensor(records, dtype=torch.int64).to(device)
        self.shrunk = torch.tensor(shrunk, dtype=torch.int64).to(device)
        self.expanded = [
            torch.tensor(
                [
                    (number, row)
                    for number in together
                    for row in range(live[number].start, live[number].stop, ROWS)
                ],
                dtype=torch.int64,
            ).to(device)
            for together in _turns(live)
        ]


def _record(segment: Segment, place: int) -> tuple[int, ...]:
    term = segment.term
    parts = (term.a, term.b, term.d, term.gain, term.bias)
    halves = (isinstance(f, Tensor) and f.dtype is torch.bfloat16 for f in (term.a, term.b))
    return (
        *(segment.start, segment.stop),
        *(0 if part is None else part.data_ptr() for part in parts),
        term.rank,
        *(int(half) for half in halves),
        place,
    )


def _turns(segments: Sequence[Segment]) -> list[list[int]]:
    """Numbers of the segments that may be expanded together: those that share a row take turns,
    in the order given."""
    turns: list[list[int]] = []
    turn_of: list[int] = []
    for number, segment in enumerate(segments):
        earlier = (
            turn_of[n] + 1
            for n, other in enumerate(segments[:number])
            if other.start < segment.stop and segment.start < other.stop
        )
        turn = max(earlier, default=0)
        turn_of.append(turn)
        if turn == len(turns):
            turns.append([])
        turns[turn].append(number)
    return turns


_layouts: WeakKeyDictionary[LowRankPlan, _Layout] = WeakKeyDictionary()


def lowrank_add(y: Tensor, x: Tensor, plan: LowRankPlan) -> Tensor:
    """In place: y [T, out] = gain * (y + B (d * (A x))) + bias by segment, x [T, in]; returns y.

    y and x in float32, bfloat16 or float16; the rows of y have to be contiguous each. The plan
    was checked against both, and lies on their device.
    """
    layout = _layouts.get(plan)
    if layout is None:
        layout = _layouts[plan] = _Layout(plan, y.device)
    if not layout.expanded:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    h = torch.empty(layout.workspace, dtype=torch.float32, device=y.device)
    if len(layout.shrunk):
        _shrink[(len(layout.shrunk), layout.splits)](
            *(x, x.stride(0), h, layout.segments, layout.shrunk, x.shape[1]),
            FIELDS=_FIELDS,
            ROWS=ROWS,
            RANKS=RANKS,
            COLUMNS=COLUMNS,
            SPLIT=SPLIT,
        )
    for tiles in layout.expanded:
        _expand[(len(tiles), triton.cdiv(y.shape[1], OUTPUTS))](
            *(y, y.stride(0), h, layout.segments, tiles, y.shape[1], layout.splits),
            FIELDS=_FIELDS,
            ROWS=ROWS,
            RANKS=RANKS,
            OUTPUTS=OUTPUTS,
        )
    return y


def slots_add(y: Tensor, x: Tensor, plan: SlotPlan) -> Tensor:
    """In place, as `lowrank_add` and to its bits, for rows told by tiles; returns y.

    Launches depend on the shapes of y, x and the tiles alone, and nothing waits for the device.
    """
    width, outputs = x.shape[1], y.shape[1]
    splits = triton.cdiv(width, SPLIT)
    x = x if x.stride(1) == 1 else x.contiguous()
    h = torch.empty(x.shape[0] * splits * MOST_RANK, dtype=torch.float32, device=y.device)
    records, tiles = plan.records, plan.tiles
    shared = (h, records, records.stride(0), tiles)
    _shrink_slots[(len(tiles), splits, APART)](
        *(x, x.stride(0), *shared, width, splits),
        MOST=MOST_RANK,
        ROWS=ROWS,
        RANKS=RANKS,
        COLUMNS=COLUMNS,
        SPLIT=SPLIT,
        APART=APART,
    )
    _expand_slots[(len(tiles), triton.cdiv(outputs, OUTPUTS))](
        *(y, y.stride(0), *shared, outputs, splits),
        MOST=MOST_RANK,
        ROWS=ROWS,
        RANKS=RANKS,
        OUTPUTS=OUTPUTS,
    )
    return y
