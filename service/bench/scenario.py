"""Scenario and Round: what is asked for at once, and what one try at it took."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests that arrive together; request i uses adapter `adapters[i]`, None is the base.

    The numbers are those of `random_adapters.assortment`: 0 to 7 are LoRAs, 8 to 15 DoRAs.
    """

    name: str
    adapters: tuple[int | None, ...]
    prompt_tokens: int | None = None  # in place of the run's
    new_tokens: int | None = None  # in place of the run's
    shared_tokens: int = 0  # that all prompts of a round begin with
    counts: Literal["output", "prompt"] = "output"  # the tokens that its rate is of
    quoted: int = 0  # tokens that an answer quotes at a time; 0: it says what the model says

    def prompt_of(self, run: int) -> int:
        """Prompt tokens of each request, where the run's other scenarios have `run`."""
        return self.prompt_tokens or run

    def new_of(self, run: int) -> int:
        """Output tokens of each request, likewise."""
        return self.new_tokens or run


BASE = Scenario("1 base", (None,))
ONE = Scenario("1 adapter", (0,))
SAME = Scenario("8, same adapter", (0,) * 8)
DISTINCT = Scenario("8, distinct adapters", tuple(range(8)))
NONE = Scenario("8, no adapter", (None,) * 8)
DORA = Scenario("8, distinct DoRA", tuple(range(8, 16)))
MANY = Scenario("32, mixed kinds and ranks", tuple(range(32)))
PREFILL = Scenario("prefill 512", (None,), prompt_tokens=512, new_tokens=1, counts="prompt")
CHAT = Scenario("8 chats, shared prefix", (0,) * 8, prompt_tokens=512, shared_tokens=448)
COPYING = Scenario("copying", (None,), prompt_tokens=256, new_tokens=128, quoted=16)
COPIES = Scenario("8, copying", (None,) * 8, prompt_tokens=256, new_tokens=128, quoted=16)
QUICK = (BASE, ONE, SAME, DISTINCT, NONE)
FULL = (*QUICK, DORA, MANY, PREFILL, CHAT, COPYING, COPIES)
SUITES = {"quick": QUICK, "full": FULL}


@dataclass(frozen=True, slots=True)
class Job:
    """One round of a scenario: every peer gets the same prompts, no round the same as another."""

    scenario: Scenario
    prompts: tuple[tuple[int, ...], ...]  # token ids
    new_tokens: int  # exactly so many for each request
    answers: tuple[tuple[int, ...], ...] = ()  # what each must say; none: whatever it says

    def shortened(self, new_tokens: int) -> Job:
        """The same, with no more than so many new tokens."""
        return replace(self, new_tokens=min(self.new_tokens, new_tokens))


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

    No two rounds share a prompt, or a prefix cache would answer for the engine. What the prompts
    of one round share is the scenario's to say.
    """
    chance = random.Random(f"{scenario.name} {number}")
    first = min(16, vocabulary // 2)  # low ids are often special

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(first, vocabulary) for _ in range(count))

    shared = tokens(scenario.shared_tokens)
    own = scenario.prompt_of(prompt_tokens) - len(shared)
    prompts = tuple(shared + tokens(own) for _ in scenario.adapters)
    new = scenario.new_of(new_tokens)
    if not scenario.quoted:
        return Job(scenario, prompts, new)
    answers = tuple(_quoting(prompt, scenario.quoted, chance, tokens)[:new] for prompt in prompts)
    return Job(scenario, prompts, new, answers)


def _quoting(
    prompt: tuple[int, ...],
    length: int,
    chance: random.Random,
    tokens: Callable[[int], tuple[int, ...]],
) -> tuple[int, ...]:
    """Passages of the prompt, `length` tokens each, with a quarter as many new ones between."""
    answer: tuple[int, ...] = ()
    while len(answer) < len(prompt):
        start = chance.randrange(len(prompt) - length)
        answer += tokens(length // 4) + prompt[start : start + length]
    return answer
