"""Intervals against published values, and how often they hold what they should."""

from __future__ import annotations

import random

import pytest

from adapters.intervals import Sample, mean, mean_difference, rate, rate_difference, t_quantile


@pytest.mark.parametrize(
    ("confidence", "freedom", "wanted"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.95, 5, 2.5706),
        (0.95, 10, 2.2281),
        (0.95, 30, 2.0423),
        (0.95, 120, 1.9799),
        (0.95, 1e9, 1.9600),
        (0.99, 3, 5.8409),
        (0.90, 8, 1.8595),
    ],
)
def test_quantiles_of_students_table(confidence: float, freedom: float, wanted: float) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(wanted, abs=6e-5)


def test_newcombes_own_examples() -> None:
    """Newcombe 1998, table II, cases (a), (c) and (g) by method 10."""
    for (hits, n, other, m), bounds in {
        (56, 70, 48, 80): (0.0524, 0.3339),
        (9, 10, 3, 10): (0.1705, 0.8090),
        (5, 56, 0, 29): (-0.0381, 0.1926),
    }.items():
        found = rate_difference(hits, n, other, m)
        assert found is not None
        assert (found.low, found.high) == pytest.approx(bounds, abs=6e-5)


def test_wilsons_interval() -> None:
    """Newcombe 1998 (single proportions), table I: 81 of 263 and 0 of 20."""
    for (hits, n), bounds in {(81, 263): (0.2553, 0.3662), (0, 20): (0.0, 0.1611)}.items():
        found = rate(hits, n)
        assert found is not None
        assert (found.low, found.high) == pytest.approx(bounds, abs=6e-5)


def sample(*numbers: float) -> Sample:
    return Sample(len(numbers), sum(numbers), sum(n * n for n in numbers))


def test_nothing_and_one_number() -> None:
    assert rate(0, 0) is None
    assert rate_difference(0, 0, 1, 2) is None
    assert mean(Sample(0, 0, 0)) is None
    alone = mean(sample(3.0))
    assert alone is not None
    assert (alone.estimate, alone.low, alone.high) == (3.0, None, None)
    beside = mean_difference(sample(3.0), sample(1.0, 2.0))
    assert beside is not None
    assert (beside.estimate, beside.low) == (1.5, None)


def test_equal_numbers_leave_no_doubt() -> None:
    found = mean_difference(sample(2.0, 2.0), sample(1.0, 1.0, 1.0))
    assert found is not None
    assert (found.low, found.high) == (1.0, 1.0)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """95 of 100, within what 600 trials can tell; a wrong z, t or variance falls out of it."""
    dice = random.Random(7)
    trials, held = 600, [0, 0]
    for _ in range(trials):
        hits, other = (sum(dice.random() < p for _ in range(60)) for p in (0.7, 0.55))
        difference = rate_difference(hits, 60, other, 60)
        means = mean_difference(
            sample(*(dice.gauss(5, 2) for _ in range(9))),
            sample(*(dice.gauss(4, 1) for _ in range(14))),
        )
        for place, (found, truth) in enumerate(((difference, 0.15), (means, 1.0))):
            assert found is not None
            assert found.low is not None
            assert found.high is not None
            held[place] += found.low <= truth <= found.high
    assert all(0.92 < count / trials < 0.98 for count in held), held
