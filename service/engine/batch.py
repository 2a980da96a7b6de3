"""One step's tensors: the tokens of all chunks laid end to end."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from service.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of S chunks; L of the T rows need logits."""

    chunks: tuple[Chunk, ...]
    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64
    slot_mapping: torch.Tensor  # [T] int64: block * block_size + offset, where K and V are written
    block_tables: torch.Tensor  # [S, M] int32, padded with 0
    query_start: torch.Tensor  # [S + 1] int32
    context_length: torch.Tensor  # [S] int32: keys that the last token of the chunk sees
    logit_rows: torch.Tensor  # [L] int64, rows of T
    logit_chunks: tuple[int, ...]  # [L] index into chunks

    @property
    def tokens(self) -> int:
        return int(self.input_ids.shape[1])

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on `device`; itself where they are there already."""
        if self.input_ids.device == device:
            return self
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            slot_mapping=self.slot_mapping.to(device),
            block_tables=self.block_tables.to(device),
            query_start=self.query_start.to(device),
            context_length=self.context_length.to(device),
            logit_rows=self.logit_rows.to(device),
        )


def build_batch(chunks: Seq[Chunk], block_size: int) -> Batch:
    """Lay the chunks end to end, those of one adapter side by side so that segments are long.

    On the host, where the engine reads some of it again; the runner takes it to its device.
    """
    ordered = tuple(sorted(chunks, key=_by_adapter))
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    rows: list[int] = []
    owners: list[int] = []
    for index, chunk in enumerate(ordered):
        sequence, stop = chunk.sequence, chunk.start + chunk.rows
        ids += chunk.tokens
        places = range(sequence.virtual_tokens + chunk.start, sequence.virtual_tokens + stop)
        positions += places
        slots += [sequence.blocks[p // block_size] * block_size + p % block_size for p in places]
        first = starts[-1]
        starts.append(first + chunk.rows)
        wanted = _logit_rows(chunk, first)
        rows += wanted
        owners += [index] * len(wanted)
    lengths = [c.sequence.virtual_tokens + c.start + c.rows for c in ordered]
    used = [-(-length // block_size) for length in lengths]
    table = [
        c.sequence.blocks[:n] + [0] * (max(used) - n) for c, n in zip(ordered, used, strict=True)
    ]
    return Batch(
        chunks=ordered,
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        slot_mapping=torch.tensor(slots),
        block_tables=torch.tensor(table, dtype=torch.int32),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_length=torch.tensor(lengths, dtype=torch.int32),
        logit_rows=torch.tensor(rows, dtype=torch.int64),
        logit_chunks=tuple(owners),
    )


def _by_adapter(chunk: Chunk) -> tuple[str, ...]:
    ref = chunk.sequence.adapter
    return ref.key if ref else ()


def _logit_rows(chunk: Chunk, first: int) -> list[int]:
    """The last row if the chunk samples, and those of its draft; every prompt row too when their
    logprobs are wanted."""
    last = first + chunk.count - 1
    sequence = chunk.sequence
    if not sequence.request.prompt_logprobs or sequence.generated:
        return list(range(last, first + chunk.rows)) if chunk.samples else []
    scored = min(chunk.start + chunk.count, sequence.prompt_length - 1) - chunk.start
    rows = list(range(first, first + max(scored, 0)))
    return [*rows, last] if chunk.samples else rows
