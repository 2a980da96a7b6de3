"""Documents laid end to end in rows of a fixed length, with a weight for every token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer

from base.mini import corpus
from base.mini.dialogue import ANSWER, Document
from base.mini.tokenizer import END_OF_TEXT, SPECIAL


@dataclass(frozen=True)
class Packed:
    """ids and weights, both [rows, length]; a weight belongs to the token it stands under."""

    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Phase:
    """A stretch of the training: up to which progress, with which rows, how hard at its end."""

    until: float
    rows: int
    length: int
    difficulty: float
    repeats: float


# Copying is learnt in two moves. Random tokens repeated at one fixed distance teach within 150
# steps how to say again what is attended to; then random distances teach to find it by what stood
# before. Random distances from the start, or mixed with other text, took several times as long.
# Then come short contexts with few names, widened step by step; a last stretch at full length
# teaches the far positions.
FIXED, WARM_UP = 180, 420
REPEATS = Phase(0.0, 32, 64, 0.0, 1.0)
PHASES = (
    Phase(0.16, 16, 128, 0.15, 0.05),
    Phase(0.50, 8, 256, 0.7, 0.03),
    Phase(0.96, 6, 384, 1.0, 0.02),
    Phase(1.00, 3, 1024, 1.0, 0.02),
)


def phase_at(progress: float) -> tuple[Phase, float]:
    """The phase at a progress from 0 to 1, and the difficulty there (linear within the phase)."""
    start, level = 0.0, 0.0
    for phase in PHASES:
        if progress < phase.until or phase is PHASES[-1]:
            share = min(1.0, (progress - start) / (phase.until - start))
            return phase, level + (phase.difficulty - level) * share
        start, level = phase.until, phase.difficulty
    raise AssertionError("the last phase always matches")


Tokens = tuple[list[int], list[float]]


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Tokens]:
    """Token ids and weights of each document, its end mark included."""
    pieces = [piece.text for document in documents for piece in document]
    encoded = iter(tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None, "not mini's tokenizer"
    found: list[Tokens] = []
    for document in documents:
        ids: list[int] = []
        weights: list[float] = []
        for piece in document:
            tokens: list[int] = next(encoded).ids
            ids += tokens
            weights += [piece.weight] * len(tokens)
        found.append(([*ids, end], [*weights, 0.0]))
    return found


def repeated(rng: Random, vocabulary: int, length: int, period: int | None = None) -> Tokens:
    """Random tokens said again and again: only copying from context can foretell them."""
    period = period or rng.randint(3, length // 2)
    once = [rng.randrange(len(SPECIAL), vocabulary) for _ in range(period)]
    times = length // period + 1
    weights = [0.0] * period + [ANSWER] * (period * (times - 1))
    return (once * times)[:length], weights[:length]


def fill(documents: Iterable[Tokens], length: int) -> Tokens:
    """One row: documents end to end, the last one cut."""
    ids: list[int] = []
    weights: list[float] = []
    for more, weight in documents:
        ids += more
        weights += weight
        if len(ids) >= length:
            break
    assert len(ids) >= length, "too few documents for the row"
    return ids[:length], weights[:length]


def batch(tokenizer: Tokenizer, seed: int, step: int, progress: float) -> Packed:
    """The training batch of a step: a pure function of its arguments."""
    phase, difficulty = phase_at(progress) if step >= WARM_UP else (REPEATS, 0.0)
    rng = Random(f"{seed}/batch/{step}")
    stream = corpus.documents(f"{seed}/{step}", "train", difficulty)
    rows = []
    pending: list[Tokens] = []
    for _ in range(phase.rows):
        if rng.random() < phase.repeats:
            period = phase.length // 2 if step < FIXED else None
            rows.append(repeated(rng, tokenizer.get_vocab_size(), phase.length, period))
            continue
        while sum(len(ids) for ids, _ in pending) < phase.length:
            pending += encode(tokenizer, [next(stream) for _ in range(4)])
        rows.append(fill(pending, phase.length))
        used = 0
        while used < phase.length:
            used += len(pending.pop(0)[0])
    return Packed(torch.tensor([ids for ids, _ in rows]), torch.tensor([w for _, w in rows]))
