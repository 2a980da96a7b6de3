"""Steps of few tokens as CUDA graphs: captured when the engine starts, one for each size.

A step takes the least size that its tokens fit. Rows beyond them are of no sequence and no adapter,
and write their keys and values to blocks that nobody owns. Nothing of a capture depends on which
sequences or adapters a step has: all that changes stands in tensors at fixed addresses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch

from adapters.operator import Segments, SlottedOperator
from base.kernels import Recorder, Staged
from service.engine.batch import Batch

log = logging.getLogger(__name__)

LARGEST = 256  # tokens of a captured step
_SLOTS = 4  # of adapters, for each row: those of the last few steps stay

Forward = Callable[[Batch, Mapping[str, Any]], tuple[torch.Tensor, torch.Tensor]]


def sizes_for(sequences: int) -> tuple[int, ...]:
    """1, 2, 4 and so on: each step of as many sequences, a token each, fits one."""
    most = min(sequences, LARGEST)
    return tuple(1 << n for n in range(LARGEST.bit_length()) if 1 << n < 2 * most)


@dataclass(frozen=True, slots=True)
class _Fields:
    """The parts of two flat tensors: room for R tokens of R sequences of at most M blocks."""

    input_ids: torch.Tensor  # [R]
    position_ids: torch.Tensor  # [R]
    slot_mapping: torch.Tensor  # [R]
    query_start: torch.Tensor  # [R + 1]
    context_length: torch.Tensor  # [R]
    tiles: torch.Tensor  # [R, 3]
    block_tables: torch.Tensor  # [R, M]; the last, so that a step need not send all of it

    @classmethod
    def of(cls, tokens: torch.Tensor, index: torch.Tensor, rows: int, width: int) -> _Fields:
        counts = [rows + 1, rows, 3 * rows, rows * width]
        starts, contexts, tiles, tables = torch.split(index, counts)
        ids, positions, slots = tokens.view(3, rows)
        tiles, tables = tiles.view(rows, 3), tables.view(rows, width)
        return cls(ids, positions, slots, starts, contexts, tiles, tables)


class StaticBatch:
    """The tensors that captured steps read. `scratch` is the first of `rows` slots of the KV cache
    that belong to nobody."""

    def __init__(self, rows: int, width: int, scratch: int, device: torch.device) -> None:
        self.rows, self.width = rows, width
        self._scratch = torch.arange(scratch, scratch + rows)
        self._tokens = Staged(3 * rows, torch.int64, device)
        self._before_tables = 5 * rows + 1
        self._index = Staged(self._before_tables + rows * width, torch.int32, device)
        self._there = _Fields.of(self._tokens.there, self._index.there, rows, width)
        self._every = torch.arange(rows, device=device)

    def batch(self, size: int) -> Batch:
        """What a captured step of `size` rows computes: logits of all of them."""
        there = self._there
        return Batch(
            chunks=(),
            input_ids=there.input_ids[None, :size],
            position_ids=there.position_ids[None, :size],
            slot_mapping=there.slot_mapping[:size],
            block_tables=there.block_tables[:size],
            query_start=there.query_start[: size + 1],
            context_length=there.context_length[:size],
            logit_rows=self._every[:size],
            logit_chunks=(),
        )

    def tiles(self, size: int) -> torch.Tensor:
        """[size, 3] of a captured step: see SlotPlan."""
        return self._there.tiles[:size]

    def clear(self) -> None:
        """Padding alone, for captures: what an earlier step left may be more than a size's rows."""
        here = _Fields.of(self._tokens.writable(), self._index.writable(), self.rows, self.width)
        self._tokens.host.zero_()
        self._index.host.zero_()
        here.slot_mapping[:] = self._scratch
        self._tokens.send()
        self._index.send()

    def fill(self, batch: Batch, tiles: Seq[tuple[int, int, int]], size: int) -> None:
        """Make the first `size` rows this batch, whose tensors are on the host. The rest of them is
        padding, whatever else an earlier step left there: tokens that write to scratch, sequences
        without tokens, and tiles without rows."""
        rows, sequences = batch.tokens, len(batch.context_length)
        here = _Fields.of(self._tokens.writable(), self._index.writable(), self.rows, self.width)
        here.input_ids[:rows] = batch.input_ids[0]
        here.position_ids[:rows] = batch.position_ids[0]
        here.context_length[:sequences] = batch.context_length
        here.slot_mapping[:rows] = batch.slot_mapping
        here.slot_mapping[rows:size] = self._scratch[rows:size]
        here.query_start[: sequences + 1] = batch.query_start
        here.query_start[sequences + 1 : size + 1] = rows
        here.tiles[:size] = 0
        if tiles:
            here.tiles[: len(tiles)] = torch.tensor(tiles, dtype=torch.int32)
        here.block_tables[:sequences, : batch.block_tables.shape[1]] = batch.block_tables
        self._tokens.send()
        self._index.send(self._before_tables + sequences * self.width)


@dataclass(frozen=True, slots=True)
class _Captured:
    """One captured step; what it makes stays in these tensors until another is replayed."""

    hidden: torch.Tensor  # [1, size, H] before the head
    logits: torch.Tensor  # [size, vocabulary]
    replay: Callable[[], None]


class CapturedSteps:
    """The captured steps of one model, and when they can be taken."""

    def __init__(
        self,
        recorder: Recorder,
        forward: Forward,
        operator: SlottedOperator,
        static: StaticBatch,
    ) -> None:
        """`forward` gives (hidden, logits) of a batch under plans of the operator."""
        self._recorder = recorder
        self._forward = forward
        self._operator = operator
        self._static = static
        self._captured: dict[tuple[int, bool], _Captured] = {}  # by size and whether with adapters

    def capture(self, sizes: Seq[int], find_fault: Callable[[int, bool], str]) -> None:
        """Capture a step of each size, without adapters and with. `find_fault` says what is wrong
        with one, or nothing; then steps of its sort are run as they come, and the log says so."""
        started = time.perf_counter()
        if self._capture_sort(sizes, False, find_fault):
            self._capture_sort(sizes, True, find_fault)
        taken = time.perf_counter() - started
        log.info("captured %d steps in %.1f s", len(self._captured), taken)

    def _capture_sort(
        self, sizes: Seq[int], adapted: bool, find_fault: Callable[[int, bool], str]
    ) -> bool:
        # The largest first: the smaller ones then find room in what it took.
        for size in sorted(sizes, reverse=True):
            fault = self._fault_of(size, adapted, find_fault)
            if fault:
                self._captured = {k: v for k, v in self._captured.items() if k[1] != adapted}
                which = "with" if adapted else "without"
                log.warning("steps %s adapters are not captured: size %d: %s", which, size, fault)
                return False
        return True

    def _fault_of(self, size: int, adapted: bool, find_fault: Callable[[int, bool], str]) -> str:
        try:
            self._captured[size, adapted] = self._record(size, adapted)
            return find_fault(size, adapted)
        except Exception as error:  # of a driver or a library: any type, and none may stop a server
            return f"{type(error).__name__}: {error}"

    def _record(self, size: int, adapted: bool) -> _Captured:
        self._static.clear()
        batch = self._static.batch(size)
        plans = self._operator.plans(self._static.tiles(size), size) if adapted else {}
        with torch.inference_mode():
            (hidden, logits), replay = self._recorder.record(lambda: self._forward(batch, plans))
        return _Captured(hidden, logits, replay)

    def run(self, batch: Batch, segments: Segments) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(hidden [1, L, H], logits [L, vocabulary] fp32) of the rows that the batch, on the host,
        asks for; None where no captured step can say it."""
        step = self._find(batch, segments)
        if step is None:
            return None
        size, captured = step
        self._static.fill(batch, self._operator.tiles_of(segments), size)
        captured.replay()
        hidden, logits = captured.hidden, captured.logits
        if batch.logit_rows.tolist() == list(range(batch.tokens)):
            rows: slice | torch.Tensor = slice(batch.tokens)
        else:
            rows = batch.logit_rows.to(logits.device)
        return hidden[:, rows], logits[rows].to(torch.float32, copy=True)

    def forget(self, digest: str) -> None:
        self._operator.forget(digest)

    def _find(self, batch: Batch, segments: Segments) -> tuple[int, _Captured] | None:
        adapted = not segments.plain
        sizes = [size for size, with_adapters in self._captured if with_adapters == adapted]
        size = min((size for size in sizes if size >= batch.tokens), default=None)
        if size is None or batch.block_tables.shape[1] > self._static.width:
            return None
        if adapted and not self._operator.takes(segments):
            return None
        return size, self._captured[size, adapted]


def slots_for(rows: int) -> int:
    """Slots of adapters beside steps of at most `rows` rows."""
    return _SLOTS * rows
