"""Turns: several ways to do one work, measured one after another, forwards and backwards.

A machine that becomes slower is slower for all of them then: a round is both turns of each, and a
figure is a median over rounds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one turn, in seconds: on the clock, and of processor time of all its threads."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


Try = Callable[[int], Cost]  # a number that no other call has -> what it took


def in_turns(tries: Sequence[Try], rounds: int) -> list[list[Cost]]:
    """The cost of each in every round: of its turn on the way there and of that back.

    Whatever changes evenly within a round is in the middle of it for all of them. Each round begins
    with another, so that none always follows itself. One turn of each before them is not counted.
    """
    taken: list[list[Cost]] = [[] for _ in tries]
    numbers = itertools.count()
    for ask in tries:
        ask(next(numbers))
    for round_ in range(rounds):
        first = round_ % len(tries)
        there = [*range(first, len(tries)), *range(first)]
        sums = [Cost(0.0, 0.0)] * len(tries)
        for place in (*there, *reversed(there)):
            sums[place] += tries[place](next(numbers))
        for mine, cost in zip(taken, sums, strict=True):
            mine.append(cost)
    return taken


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of what `values` were drawn from lies, with 95 % confidence or more.

    By ranks, so whatever their distribution is: the k-th lowest and the k-th highest, for the
    largest k that a fair coin stays below in `len(values)` throws no more often than in 2.5 %.
    With less than 6 values there is no such k; then it is all of them.
    """
    ordered, count = sorted(values), len(values)
    below, k = 0.5**count, 0
    while below <= 0.025:
        k += 1
        below += math.comb(count, k) * 0.5**count
    k = max(k, 1)
    return ordered[k - 1], ordered[-k]


def beside(mine: Sequence[Cost], others: Sequence[Cost]) -> Figures:
    """How much more it takes than another, on the clock and in processor time."""
    pairs = list(zip(mine, others, strict=True))
    return {
        **_interval([a.wall / b.wall for a, b in pairs]),
        "cpu": _interval([a.cpu / b.cpu for a, b in pairs]),
    }


def _interval(ratios: Sequence[float]) -> Figures:
    lowest, highest = median_interval(ratios)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(lowest, 3),
        "highest": round(highest, 3),
    }
