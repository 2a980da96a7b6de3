"""What may come next, guessed from what was said before: prompt lookup decoding (Saxena 2023,
"Prompt Lookup Decoding"; Yang et al. 2023, "Inference with Reference", arXiv 2304.04487).

The longest ending of a sequence that stands in it once before tells what followed there: the draft.
One step computes the draft's rows behind the sequence's own, and the sampler takes each of them as
if it had come by itself; where it chooses another token than the draft, the rest is dropped. So the
output is that of plain decoding to the bit, sampled or greedy, and only the time differs.

A row costs time even when it is dropped, so rows are for guesses that are likely enough: each
sequence learns how often a match of a given length was right (`Drafter`), the engine how much a row
costs beside the step itself (`Pace`), and the rows of all sequences compete (`lengths`). No torch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

LONGEST = 16  # tokens of a match that are compared
PRIOR = (0.15, 0.4, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85)  # right guesses, by the length of the match
PRIOR_WEIGHT = 3.0  # guesses that the prior counts for
MEMORY = 0.95  # of a guess, when the next one of its kind is told


class Drafter:
    """Guesses for one sequence, and how good they have been.

    It is told nothing: what it guessed last time is compared with what stands there now, whether
    anybody spent rows on it or not. So it finds out by itself when guessing pays again.
    """

    def __init__(self, most: int, limit: int) -> None:
        """`most` tokens in a draft; `limit` tokens of the sequence, prompt and output."""
        self.most = most
        self.limit = limit
        self._tokens = np.empty(limit, dtype=np.int32)
        self._length = 0
        self._guess: tuple[int, ...] = ()
        self._match = 0  # tokens of the match that the guess stands on
        self._right = [PRIOR_WEIGHT * chance for chance in PRIOR]
        self._told = [PRIOR_WEIGHT] * len(PRIOR)

    def draft(self, tokens: Seq[int]) -> tuple[int, ...]:
        """What may follow `tokens`, which go on from those of the last call. The token that the
        step gives in any case needs no row, so the last that may come is never in a draft."""
        self._read(tokens)
        known = self._tokens[: self._length]
        self._match, source = longest_match(known)
        room = min(self.most, self.limit - self._length - 1)
        self._guess = continued(known, source, room) if self._match else ()
        return self._guess

    def chances(self) -> list[float]:
        """For each token of the last draft, how likely it is right and all before it."""
        found, chance = [], 1.0
        for i in range(len(self._guess)):
            kind = _kind(self._match + i)
            chance *= self._right[kind] / self._told[kind]
            found.append(chance)
        return found

    def _read(self, tokens: Seq[int]) -> None:
        new = tokens[self._length :]
        for i, (guessed, token) in enumerate(zip(self._guess, new, strict=False)):
            kind = _kind(self._match + i)
            self._right[kind] = self._right[kind] * MEMORY + (guessed == token)
            self._told[kind] = self._told[kind] * MEMORY + 1.0
            if guessed != token:
                break
        self._tokens[self._length : len(tokens)] = new
        self._length = len(tokens)


def _kind(match: int) -> int:
    return min(match, len(PRIOR)) - 1


def longest_match(tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> tuple[int, int]:
    """How long an ending of `tokens` [t] occurs earlier, at most LONGEST, and the place behind its
    latest occurrence; (0, 0) where even the last token is new."""
    last = len(tokens) - 1
    ends = np.flatnonzero(tokens[:last] == tokens[last]) if last > 0 else np.empty(0, np.intp)
    if not len(ends):
        return 0, 0
    length = 1
    while length < min(LONGEST, last):
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[last - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    return length, int(ends[-1]) + 1


def continued(
    tokens: np.ndarray[tuple[int], np.dtype[np.int32]], source: int, count: int
) -> tuple[int, ...]:
    """`count` tokens from the place `source` on; what repeats itself goes on doing so."""
    found = tokens[source : source + max(count, 0)].tolist()
    return tuple(found[i % len(found)] for i in range(count)) if found else ()


class Pace:
    """What a step costs beside one row of it: seconds = slope * (fixed + rows), by least squares
    over the steps that only decode, older ones counting less."""

    PRIOR = 12.0  # rows; half a billion weights in NF4 on two cores
    BOUNDS = (1.0, 512.0)

    def __init__(self) -> None:
        self._steps = 0.0
        self._rows = self._seconds = self._rows_2 = self._both = 0.0

    @property
    def fixed(self) -> float:
        """The step's own cost, in rows."""
        if not self._steps:
            return self.PRIOR
        rows, seconds = self._rows / self._steps, self._seconds / self._steps
        squares = max(self._rows_2 - rows * self._rows, 0.0)
        products = self._both - rows * self._seconds
        # The prior weighs as much as ten steps whose rows deviate by one.
        slope = (products + 10.0 * seconds / (self.PRIOR + rows)) / (squares + 10.0)
        least, most = self.BOUNDS
        return min(max(seconds / slope - rows, least), most) if slope > 0 else most

    def note(self, rows: int, seconds: float) -> None:
        """A step that computed no prompts. One that took far longer than usual tells nothing."""
        if not rows or (self._steps > 8 and seconds > 4 * self._seconds / self._steps):
            return
        for name, value in (
            ("_steps", 1.0),
            ("_rows", rows),
            ("_seconds", seconds),
            ("_rows_2", rows * rows),
            ("_both", rows * seconds),
        ):
            setattr(self, name, getattr(self, name) * 0.99 + value)


def lengths(chances: Seq[Seq[float]], sampling: int, fixed: float, budget: int) -> list[int]:
    """How much of each draft is worth its rows, in a step that gives `sampling` sequences a token.

    Tokens per second are (sampling + sum of chances) / (fixed + rows): a row is worth while where
    its chance is above that ratio. The likeliest come first, and no draft skips a token.
    """
    found = [0] * len(chances)
    rows, tokens = fixed + sampling, float(sampling)
    line = sorted(((c, i) for i, own in enumerate(chances) for c in own), key=lambda e: -e[0])
    for chance, i in line[: max(budget, 0)]:
        if chance * rows <= tokens:
            break
        found[i] += 1
        rows, tokens = rows + 1, tokens + chance
    return found
