"""Scenario and Round: what is asked for at once, and what one try at it took."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests that arrive together; request i uses adapter `adapters[i]`, None is the base."""

    name: str
    adapters: tuple[int | None, ...]


BASE = Scenario("1 base", (None,))
ONE = Scenario("1 adapter", (0,))
SAME = Scenario("8, same adapter", (0,) * 8)
DISTINCT = Scenario("8, distinct adapters", tuple(range(8)))
SCENARIOS = (BASE, ONE, SAME, DISTINCT)


@dataclass(frozen=True, slots=True)
class Job:
    """One round of a scenario: every peer gets the same prompts, no round the same as another."""

    scenario: Scenario
    prompts: tuple[tuple[int, ...], ...]  # token ids
    new_tokens: int  # exactly so many for each request


@dataclass(frozen=True, slots=True)
class Round:
    """What one round took, in seconds. All requests arrive when it starts."""

    seconds: float  # until the last token of the last request
    tokens: int  # generated, by all requests together
    first_token: tuple[float, ...]  # of each request, from its arrival
    gaps: tuple[float, ...]  # between two adjacent tokens of a request

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def round_of(arrival: float, times: list[list[float]]) -> Round:
    """`times[i]` is when each token of request i came, on the clock of `arrival`."""
    return Round(
        seconds=max(each[-1] for each in times) - arrival,
        tokens=sum(len(each) for each in times),
        first_token=tuple(each[0] - arrival for each in times),
        gaps=tuple(b - a for each in times for a, b in itertools.pairwise(each)),
    )


def job(
    scenario: Scenario, number: int, vocabulary: int, prompt_tokens: int, new_tokens: int
) -> Job:
    """The scenario's round `number`, its prompts drawn from the seed of that number.

    No two rounds share a prompt, or a prefix cache would answer for the engine.
    """
    chance = random.Random(f"{scenario.name} {number}")
    first = min(16, vocabulary // 2)  # low ids are often special
    prompts = tuple(
        tuple(chance.randrange(first, vocabulary) for _ in range(prompt_tokens))
        for _ in scenario.adapters
    )
    return Job(scenario, prompts, new_tokens)
