"""What a step of the engine costs, fitted to the JSON file that `nibble bench --json` wrote.

    step = fixed + row n + adapter_row m + adapter d + prompt_token p

for n sequences that get their next token, m of which use an adapter, d adapters in all, and p
tokens of prompts. None of the five is negative. The median time between two tokens of each workload
gives an equation, and so does the median time to the first one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.bench.scenario import QUICK, Scenario

MAX_STEP_TOKENS = 512  # as of the engine: see EngineConfig


class UnusableBench(ValueError):
    """The file lacks what a calibration needs; the message says what."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds."""

    fixed: float
    row: float
    adapter_row: float
    adapter: float
    prompt_token: float

    def seconds(self, rows: int, adapter_rows: int, adapters: int, prompt_tokens: int) -> float:
        return (
            self.fixed
            + self.row * rows
            + self.adapter_row * adapter_rows
            + self.adapter * adapters
            + self.prompt_token * prompt_tokens
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
        cost, worst = _fit([equation for each in QUICK for equation in _of(each, rows, prompt)])
        return Calibration(
            model=model,
            peer=peer,
            cost=cost,
            worst_fit=worst,
            base_bytes=int(memory["rss_bytes"]),
            kv_cache_bytes=int(facts["kv_cache_bytes"]),
            token_bytes=int(facts["token_bytes"]),
            adapter_bytes=int(facts["each_adapter_bytes"][0]),
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnusableBench(
            f"no file of `nibble bench --json` with {peer!r} in it: {error!r}"
        ) from error


def _of(
    scenario: Scenario, rows: Mapping[str, Any], prompt: int
) -> list[tuple[tuple[int, int, int, int, int], float]]:
    """Two equations: of a step in which all generate, and of the steps that read the prompts."""
    used = [each for each in scenario.adapters if each is not None]
    many, named, kinds = len(scenario.adapters), len(used), len(set(used))
    tokens = many * scenario.prompt_of(prompt)
    steps = -(-tokens // MAX_STEP_TOKENS)
    row = rows[scenario.name]
    return [
        ((1, many, named, kinds, 0), row["inter_token_ms"]["p50"] / 1000),
        ((steps, 0, 0, kinds * steps, tokens), row["first_token_ms"]["p50"] / 1000),
    ]


def _fit(
    equations: Sequence[tuple[tuple[int, int, int, int, int], float]],
) -> tuple[StepCost, float]:
    """Least squares of relative errors, no coefficient below 0; the cost, and its worst error.

    With five coefficients all choices of those that are 0 can be tried.
    """
    left = np.array([each for each, _ in equations], dtype=float)
    right = np.array([seconds for _, seconds in equations])
    if not (right > 0).all():
        raise UnusableBench("a workload took no time at all")
    left /= right[:, None]
    best, least = np.zeros(5), np.inf
    for count in range(1, 6):
        for chosen in itertools.combinations(range(5), count):
            columns = list(chosen)
            found = np.zeros(5)
            found[columns] = np.linalg.lstsq(left[:, columns], np.ones(len(right)), rcond=None)[0]
            error = float(((left @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best, least = found, error
    return StepCost(*(float(each) for each in best)), float(np.abs(left @ best - 1).max())
