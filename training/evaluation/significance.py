"""How sure a figure is: bootstrap intervals, and tests of two systems on the same items.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993); McNemar, Psychometrika 12 (1947),
in its exact form; Koehn, "Statistical significance tests for machine translation evaluation" (2004)
for the paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Any]  # rows of resampled items [R, n, …] -> [R]
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(
    scores: Sequence[Sequence[float]] | Floats, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of scores [runs, items] by percentiles, resampling runs and items.

    Both are resampled because both are a sample: another seed and other test items would have
    given other figures. One run is one row.
    """
    table = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    means = resampled_means(table, resamples=resamples, seed=seed)
    return Estimate(float(table.mean()), *_edges(means))


def ratio(
    totals: Sequence[Sequence[float]] | Floats,
    counts: Sequence[Sequence[float]] | Floats,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Σ totals / Σ counts of items [runs, items]: nats per token, whose items differ in length."""
    above = np.atleast_2d(np.asarray(totals, dtype=np.float64))
    below = np.atleast_2d(np.asarray(counts, dtype=np.float64))
    upper = resampled_means(above, resamples=resamples, seed=seed)
    lower = resampled_means(below, resamples=resamples, seed=seed)  # the same draws
    return Estimate(float(above.sum() / below.sum()), *_edges(upper / lower))


def resampled_means(table: Floats, *, resamples: int, seed: int) -> Floats:
    """[resamples] means of scores [runs, items]; the same seed and shape draw the same items."""
    chance = np.random.default_rng(seed)
    runs, items = table.shape
    drawn = chance.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs
    each = drawn @ table  # [resamples, items]: the drawn runs' mean of each item
    columns = chance.integers(items, size=(resamples, items))
    means: Floats = np.take_along_axis(each, columns, axis=1).mean(axis=1)
    return means


def _edges(values: Floats) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def corpus_interval(
    items: int,
    statistic: Callable[[NDArray[np.int64]], float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A figure of a whole set of items, such as macro-F1 or chrF: `statistic` of item numbers."""
    chance = np.random.default_rng(seed)
    values = [statistic(chance.integers(items, size=items)) for _ in range(resamples)]
    return Estimate(statistic(np.arange(items)), *_edges(np.asarray(values)))


@dataclass(frozen=True, slots=True)
class Paired:
    """System a less system b on the same items."""

    difference: Estimate
    p: float  # two-sided: of a difference this large, were they alike
    test: str


def mcnemar(a: Sequence[bool], b: Sequence[bool], *, seed: int = 0) -> Paired:
    """Of right and wrong answers, by the items that only one of them has right."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    apart = only_a + only_b
    tail = sum(comb(apart, k) for k in range(min(only_a, only_b) + 1))
    p = min(1.0, 2 * tail / 2**apart)
    gains = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    return Paired(bootstrap([gains], seed=seed), p, "McNemar, exact")


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Paired:
    """Of any scores of items: the difference of means, with draws of the same items for both."""
    gains = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    means = resampled_means(gains[None, :], resamples=resamples, seed=seed)
    # A draw beyond zero counts as evidence for "alike"; one is added so that p is never zero.
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (int(beyond) + 1) / (resamples + 1))
    return Paired(Estimate(float(gains.mean()), *_edges(means)), p, "paired bootstrap")
