"""What the arms of the bench learn from: examples of real lengths, the same batches for all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.data import Example
from training.data.batches import IGNORED, Batches, TrainBatch

MEDIAN, SPREAD = 74, 0.9  # of the lengths, log-normal: what instruction data looks like
WORDS = 200  # that the examples are made of, so that there is something to learn


@dataclass(frozen=True, slots=True)
class Shape:
    """One step is `rows` rows of at most `length` tokens, packed."""

    rows: int = 2
    length: int = 512
    prompt: float = 0.5  # part of an example that bears no loss
    seed: int = 0


def batches(shape: Shape, count: int, vocabulary: int) -> list[TrainBatch]:
    """`count` packed batches: a function of the shape alone, so every process finds the same."""
    chance = random.Random(shape.seed)
    words = [chance.randrange(3, vocabulary) for _ in range(WORDS)]
    odds = [1 / (rank + 1) for rank in range(WORDS)]
    data = []
    for _ in range(count * shape.rows * 12):
        size = min(shape.length, max(8, round(chance.lognormvariate(0, SPREAD) * MEDIAN)))
        tokens = tuple(chance.choices(words, odds, k=size))
        data.append(Example(tokens, max(1, round(shape.prompt * size))))
    found = Batches(data, shape.rows, 0, shape.seed, shape.length)
    assert found.per_epoch >= count, "too few examples were drawn"
    return [next(found) for _ in range(count)]


def unpacked(batch: TrainBatch) -> TrainBatch:
    """The same examples, one to a row, padded to the longest: what a plain collator makes."""
    assert batch.position_ids is not None
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for tokens, mask, labels, places in zip(
        batch.input_ids, batch.attention_mask, batch.labels, batch.position_ids, strict=True
    ):
        used = int(mask.sum())
        starts = [i for i in range(used) if int(places[i]) == 0]
        for start, stop in zip(starts, [*starts[1:], used], strict=True):
            parts.append((tokens[start:stop], labels[start:stop]))
    width = max(len(tokens) for tokens, _ in parts)
    return TrainBatch(
        _padded([t for t, _ in parts], width, 0),
        _padded([torch.ones_like(t) for t, _ in parts], width, 0),
        _padded([labels for _, labels in parts], width, IGNORED),
    )


def _padded(rows: Sequence[torch.Tensor], width: int, value: int) -> torch.Tensor:
    return torch.stack(
        [torch.nn.functional.pad(row, (0, width - len(row)), value=value) for row in rows]
    )
