from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.significance import (
    bootstrap,
    corpus_interval,
    mcnemar,
    paired_bootstrap,
    ratio,
)


def test_the_bootstrap_is_as_wide_as_the_normal_interval() -> None:
    scores = np.random.default_rng(1).random(400)
    got = bootstrap([scores.tolist()])
    half = 1.96 * scores.std() / 20
    assert got.value == pytest.approx(scores.mean())
    assert (got.low, got.high) == (
        pytest.approx(scores.mean() - half, abs=half / 5),
        pytest.approx(scores.mean() + half, abs=half / 5),
    )


def test_seeds_that_disagree_widen_the_interval() -> None:
    alike = bootstrap([[1, 0] * 50] * 3)
    apart = bootstrap([[1, 1] * 50, [1, 0] * 50, [0, 0] * 50])
    assert alike.value == apart.value == 0.5
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


def test_a_ratio_weighs_long_items_more() -> None:
    got = ratio([[10.0, 1.0]], [[10, 4]])
    assert got.value == pytest.approx(11 / 14)
    assert (got.low, got.high) == (pytest.approx(0.25), pytest.approx(1.0))


def test_mcnemar_is_the_exact_binomial_of_what_only_one_has_right() -> None:
    a = [True] * 8 + [False] * 2 + [True] * 90
    b = [False] * 8 + [True] * 2 + [True] * 90
    got = mcnemar(a, b)
    assert got.p == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert got.difference.value == pytest.approx(0.06)
    assert mcnemar(a, a).p == 1.0


def test_the_paired_bootstrap_sees_a_small_steady_gain() -> None:
    chance = np.random.default_rng(2)
    hard = chance.random(300)  # items differ far more than the two systems do
    gain = 0.02 + 0.01 * chance.standard_normal(300)
    got = paired_bootstrap((hard + gain).tolist(), hard.tolist())
    assert got.p < 0.01
    assert got.difference.low > 0.015
    noise = paired_bootstrap((hard + gain - 0.02).tolist(), hard.tolist())
    assert noise.p > 0.05 or abs(noise.difference.value) < 0.002


def test_a_figure_of_the_whole_set_is_taken_of_whole_draws() -> None:
    values = np.arange(100)
    got = corpus_interval(100, lambda index: float(np.median(values[index])))
    assert got.value == 49.5
    assert 35 < got.low < 49.5 < got.high < 65
