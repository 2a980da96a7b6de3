"""What is asked for: which adapter each request names, and when it arrives. All by a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Choice = Literal["base", "identical", "uniform", "distinct", "zipf"]
Arrival = Literal["closed", "poisson", "bursts"]

# A dozen tokens or so of each text; no two prompts begin alike, or a prefix cache would answer.
WORDS = (
    *("river", "lamp", "stone", "garden", "winter", "letter", "silver", "engine", "window"),
    *("forest", "harbor", "candle", "mirror", "valley", "copper", "anchor", "thunder", "meadow"),
)


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of traffic.

    base        no adapter: what all others are compared with
    identical   all requests name the same adapter
    uniform     each names any of them, all alike
    distinct    one after another, so that no two that run together share one
    zipf        adapter k with probability proportional to 1 / k^exponent

    closed      `clients` ask one request after another
    poisson     they arrive at a rate, whoever is still busy
    bursts      at the same mean rate, but many at once
    """

    name: str
    choice: Choice
    exponent: float = 0.0
    arrival: Arrival = "closed"

    def adapters(self, names: Sequence[str], requests: int, seed: int) -> list[str | None]:
        """The adapter of each request; None is the base."""
        if self.choice == "base":
            return [None] * requests
        if self.choice == "identical":
            return [names[0]] * requests
        if self.choice == "distinct":
            return [names[number % len(names)] for number in range(requests)]
        weights = [1 / place**self.exponent for place in range(1, len(names) + 1)]
        chance = random.Random(f"{self.choice} {self.exponent} {len(names)} {seed}")
        return list(chance.choices(names, weights, k=requests))

    def arrivals(self, requests: int, rate: float, burst: int, seed: int) -> list[float] | None:
        """Seconds from the start until each request; None: whenever a client is free."""
        if self.arrival == "closed":
            return None
        chance = random.Random(f"{self.arrival} {seed}")
        if self.arrival == "poisson":
            gaps = (chance.expovariate(rate) for _ in range(requests))
            return list(itertools.accumulate(gaps))
        return [number // burst * burst / rate for number in range(requests)]


BASE = Workload("base only", "base")
CLOSED = (
    BASE,
    Workload("identical", "identical"),
    Workload("uniform", "uniform"),
    Workload("distinct", "distinct"),
    Workload("Zipf 1.0", "zipf", 1.0),
    Workload("Zipf 1.5", "zipf", 1.5),
)
OPEN = (
    Workload("Poisson, base only", "base", arrival="poisson"),
    Workload("Poisson, Zipf 1.0", "zipf", 1.0, "poisson"),
    Workload("bursts, base only", "base", arrival="bursts"),
    Workload("bursts, Zipf 1.0", "zipf", 1.0, "bursts"),
)


def prompt(number: int, words: int, seed: int) -> str:
    chance = random.Random(f"{seed} {number}")
    return " ".join([str(chance.randrange(10**6)), *chance.choices(WORDS, k=words)])
