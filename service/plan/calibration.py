"""What a step of the engine costs, fitted to the JSON file that `nibble bench --json` wrote.

    step = max(fixed, prompts + prompt_token (p + n) + adapter_prompt_token q)
           + row n + adapter_row m + adapter d

for n sequences that get their next token, m of which use an adapter, d adapters in all, and p
tokens of prompts, q of which use an adapter; `prompts` where p is not 0. A step reads every weight
once, which is most of `fixed`, and while it computes many tokens that costs nothing: hence the
larger of both, and beside prompts a sequence's token is computed like one of theirs. How much of it
few tokens leave to see is in `prompts`. None of the seven is negative. The median time between two
tokens of each workload gives an equation, and so does the median time to the first one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from service.bench.scenario import QUICK, Scenario

MAX_STEP_TOKENS = 512  # as of the engine: see EngineConfig
BRANCHES = 8  # how often the larger of both is chosen anew


class UnusableBench(ValueError):
    """The file lacks what a calibration needs; the message says what."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one step does."""

    rows: int = 0
    adapter_rows: int = 0
    adapters: int = 0
    prompt_tokens: float = 0
    adapter_prompt_tokens: float = 0


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds."""

    fixed: float
    row: float
    adapter_row: float
    adapter: float
    prompt_token: float
    adapter_prompt_token: float
    prompts: float = 0.0

    def seconds(self, work: Work) -> float:
        return (
            max(self.fixed, self.computing(work))
            + self.row * work.rows
            + self.adapter_row * work.adapter_rows
            + self.adapter * work.adapters
        )

    def computing(self, work: Work) -> float:
        """Of all tokens, weights at hand."""
        return (
            self.prompts * (work.prompt_tokens > 0)
            + self.prompt_token * (work.prompt_tokens + work.rows)
            + self.adapter_prompt_token * work.adapter_prompt_tokens
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured on one machine with one model, as a simulation reads it."""

    model: str
    peer: str  # of the bench: `nibble fast`
    cost: StepCost
    worst_fit: float  # the largest relative error of the equations
    base_bytes: int  # of a process that serves the base alone
    kv_cache_bytes: int
    token_bytes: int  # keys and values of one token
    adapter_bytes: int  # of one LoRA in its slot


def calibrate(figures: Mapping[str, Any], peer: str = "nibble fast") -> Calibration:
    """Raises UnusableBench."""
    try:
        model, prompt = str(figures["model"]), int(figures["prompt_tokens"])
        rows = {row["scenario"]: row for row in figures["results"] if row["peer"] == peer}
        facts, memory = figures["peers"][peer], figures["memory"]
        if missing := [each.name for each in QUICK if each.name not in rows]:
            raise UnusableBench(
                f"{peer} has no row for {', '.join(missing)}: they are all in a run of "
                "`nibble bench --json FILE` without --only"
            )
        sizes = {
            "prompt_tokens": prompt,
            "memory.rss_bytes": int(memory["rss_bytes"]),
            "kv_cache_bytes": int(facts["kv_cache_bytes"]),
            "token_bytes": int(facts["token_bytes"]),
            "each_adapter_bytes": int(facts["each_adapter_bytes"][0]),
        }
        if wrong := [name for name, size in sizes.items() if size < 1]:
            raise UnusableBench(f"{', '.join(wrong)} should be at least 1")
        cost, worst = _fit([equation for each in QUICK for equation in _of(each, rows, prompt)])
        return Calibration(
            model=model,
            peer=peer,
            cost=cost,
            worst_fit=worst,
            base_bytes=sizes["memory.rss_bytes"],
            kv_cache_bytes=sizes["kv_cache_bytes"],
            token_bytes=sizes["token_bytes"],
            adapter_bytes=sizes["each_adapter_bytes"],
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnusableBench(
            f"no file of `nibble bench --json` with {peer!r} in it: {error!r}"
        ) from error


def _of(scenario: Scenario, rows: Mapping[str, Any], prompt: int) -> list[tuple[int, Work, float]]:
    """(steps, what each does, seconds of all): one in which all generate, and those that read the
    prompts."""
    used = [each for each in scenario.adapters if each is not None]
    many, named, kinds = len(scenario.adapters), len(used), len(set(used))
    each = scenario.prompt_of(prompt)
    steps = -(-many * each // MAX_STEP_TOKENS)
    row = rows[scenario.name]
    reading = Work(0, 0, kinds, many * each / steps, named * each / steps)
    return [
        (1, Work(many, named, kinds), row["inter_token_ms"]["p50"] / 1000),
        (steps, reading, row["first_token_ms"]["p50"] / 1000),
    ]


def _fit(equations: Sequence[tuple[int, Work, float]]) -> tuple[StepCost, float]:
    """The cost, and its worst relative error.

    Which steps `fixed` bounds is known once the costs are: guessed, fitted, and guessed again.
    """
    seconds = np.array([each for *_, each in equations])
    if not (seconds > 0).all():
        raise UnusableBench("a workload took no time at all")
    bounded = [work.prompt_tokens == 0 for _, work, _ in equations]
    best, least = StepCost(*[0.0] * 7), np.inf
    for _ in range(BRANCHES):
        left = [
            _terms(steps, work, as_bounded)
            for (steps, work, _), as_bounded in zip(equations, bounded, strict=True)
        ]
        cost = StepCost(*_least_squares(np.array(left, dtype=float) / seconds[:, None]))
        found = np.array([steps * cost.seconds(work) for steps, work, _ in equations])
        error = float(np.abs(found / seconds - 1).max())
        if error < least:
            best, least = cost, error
        chosen = [cost.computing(work) < cost.fixed for _, work, _ in equations]
        if chosen == bounded:
            break
        bounded = chosen
    return best, float(least)


def _terms(steps: int, work: Work, bounded: bool) -> tuple[float, ...]:
    """How often each cost is in it, in StepCost's order."""
    rows, adapter_rows, adapters, tokens, of_adapters = (steps * each for each in astuple(work))
    return (
        (steps, rows, adapter_rows, adapters, 0, 0, 0)
        if bounded
        else (0, rows, adapter_rows, adapters, tokens + rows, of_adapters, steps * (tokens > 0))
    )


def _least_squares(left: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """What makes every line's sum 1, none below 0: with seven, all choices of those that are 0 can
    be tried."""
    best, least = np.zeros(left.shape[1]), np.inf
    for count in range(1, left.shape[1] + 1):
        for chosen in itertools.combinations(range(left.shape[1]), count):
            columns = list(chosen)
            found = np.zeros(left.shape[1])
            found[columns] = np.linalg.lstsq(left[:, columns], np.ones(len(left)), rcond=None)[0]
            error = float(((left @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best, least = found, error
    return [float(each) for each in best]
