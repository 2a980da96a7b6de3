"""Batches: examples as tensors, epoch after epoch, with a cursor to go on from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from training.data.corpus import length_of
from training.data.encoding import Example
from training.data.packing import bins

IGNORED = -100  # the label that cross-entropy leaves out
_STRETCH = 32  # batches
_Rows = list[tuple[int, ...]]  # the examples of each row of a batch


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Rows padded on the right; `labels` holds IGNORED wherever no loss falls."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64
    position_ids: Tensor | None = None  # [B, L] int64 of packed rows: 0 where an example begins
    spare: bool = False  # run only because the other processes run theirs: it counts for nothing

    def parts(self, rows: int | None) -> list[TrainBatch]:
        """Batches of at most `rows` rows, each as wide as its own longest row."""
        if rows is None or rows >= len(self.input_ids):
            return [self]
        return [self._part(at, at + rows) for at in range(0, len(self.input_ids), rows)]

    def _part(self, start: int, stop: int) -> TrainBatch:
        rows, places = slice(start, stop), self.position_ids
        width = int(self.attention_mask[rows].sum(dim=1).max())
        return TrainBatch(
            self.input_ids[rows, :width],
            self.attention_mask[rows, :width],
            self.labels[rows, :width],
            None if places is None else places[rows, :width],
            self.spare,
        )

    @property
    def loss_tokens(self) -> int:
        return 0 if self.spare else int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> int:
        return 0 if self.spare else int(self.attention_mask.sum())


def collate(chosen: Sequence[Example], pad_id: int) -> TrainBatch:
    """Examples -> one batch, padded to the longest."""
    return _laid([[example] for example in chosen], pad_id)


def collate_packed(rows: Sequence[Sequence[Example]], pad_id: int) -> TrainBatch:
    """Rows of several examples -> one batch, whose position ids start again with each of them.

    The padding after them is an example of its own, which bears no loss.
    """
    batch = _laid(rows, pad_id)
    length = batch.input_ids.shape[1]
    positions = torch.zeros_like(batch.input_ids)
    for row, packed in enumerate(rows):
        lengths = [len(example.tokens) for example in packed]
        steps = [torch.arange(n) for n in (*lengths, length - sum(lengths))]
        positions[row] = torch.cat(steps)
    return TrainBatch(batch.input_ids, batch.attention_mask, batch.labels, positions)


def _laid(rows: Sequence[Sequence[Example]], pad_id: int) -> TrainBatch:
    length = max(sum(len(example.tokens) for example in row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
    for row, packed in enumerate(rows):
        at = 0
        for example in packed:
            tokens, end = torch.tensor(example.tokens), at + len(example.tokens)
            input_ids[row, at:end] = tokens
            attention_mask[row, at:end] = 1
            # An example's first token would be predicted from the example before it.
            start = max(example.answer_start, 1)
            labels[row, at + start : end] = tokens[start:]
            at = end
    return TrainBatch(input_ids, attention_mask, labels)


def pad_id(tokenizer: Any) -> int:
    """Padding is masked out, so any token serves where the tokenizer names none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


class Batches:
    """Endless batches, epoch after epoch, each of examples of similar length.

    An epoch is shuffled, cut into stretches of 32 batches, and only these are sorted by length:
    little padding, and still a new mixture each time. With `pack`, the examples of a stretch are
    laid into rows of at most `pack` tokens instead, and a batch has `size` such rows. An epoch's
    order is a function of the seed and its number, so the cursor says all that a run needs to go
    on where it stopped. `share` (rank, processes) takes every so manyth row of each batch.
    """

    def __init__(
        self,
        data: Sequence[Example],
        size: int,
        pad: int,
        seed: int,
        pack: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._share = share
        self._data, self._size, self._pad, self._seed = data, min(size, len(data)), pad, seed
        self._pack = pack
        self._epoch, self._next = 0, 0
        self._groups = self._order()

    @property
    def cursor(self) -> tuple[int, int]:
        """(epoch, batches of it that have been given out)."""
        return self._epoch, self._next

    @cursor.setter
    def cursor(self, cursor: tuple[int, int]) -> None:
        self._epoch, self._next = cursor
        self._groups = self._order()

    @property
    def per_epoch(self) -> int:
        """Batches of this epoch: with `pack`, one epoch may have a few more than another."""
        return len(self._groups)

    def __iter__(self) -> Iterator[TrainBatch]:
        return self

    def __next__(self) -> TrainBatch:
        if self._next == len(self._groups):
            self.cursor = (self._epoch + 1, 0)
        group = self._groups[self._next]
        self._next += 1
        return self._batch(group)

    def heaviest(self) -> TrainBatch:
        """A batch that no other outweighs: the longest examples; packed, the widest of an epoch."""
        if self._pack is not None:
            return self._batch(max(self._groups, key=self._area))
        longest = sorted(range(len(self._data)), key=lambda i: -length_of(self._data, i))
        return self._batch([(i,) for i in longest[: self._size]])

    def _area(self, group: _Rows) -> int:
        return len(group) * max(sum(length_of(self._data, i) for i in row) for row in group)

    def _batch(self, group: _Rows) -> TrainBatch:
        rank, processes = self._share
        mine = group[rank::processes]
        rows = [[self._data[i] for i in row] for row in mine or group[:1]]
        batch = _laid(rows, self._pad) if self._pack is None else collate_packed(rows, self._pad)
        return batch if mine else replace(batch, spare=True)

    def _order(self) -> list[_Rows]:
        chance = random.Random(f"{self._seed} {self._epoch}")
        order = chance.sample(range(len(self._data)), len(self._data))
        if self._pack is not None:
            return self._packed(order, chance)
        size = self._size
        groups: list[_Rows] = []
        for start in range(0, len(order), _STRETCH * size):
            stretch = order[start : start + _STRETCH * size]
            stretch.sort(key=lambda i: length_of(self._data, i))
            groups += [
                [(i,) for i in stretch[at : at + size]] for at in range(0, len(stretch), size)
            ]
        chance.shuffle(groups)
        return groups

    def _packed(self, order: list[int], chance: random.Random) -> list[_Rows]:
        """Rows are dealt to batches at random: one batch of short examples would weigh more."""
        assert self._pack is not None
        rows: _Rows = []
        for start in range(0, len(order), _STRETCH * _STRETCH):
            stretch = order[start : start + _STRETCH * _STRETCH]
            found = bins([length_of(self._data, i) for i in stretch], self._pack)
            rows += [tuple(stretch[i] for i in row) for row in found]
        chance.shuffle(rows)
        return [rows[at : at + self._size] for at in range(0, len(rows), self._size)]
