from __future__ import annotations

import math

import pytest

from service.bench.turns import Cost, beside, in_turns, median_interval


def test_turns_go_forwards_and_backwards_and_each_begins_once() -> None:
    asked: list[tuple[str, int]] = []

    def one(name: str, number: int) -> Cost:
        asked.append((name, number))
        return Cost(float(number), 10.0 * number)

    taken = in_turns([lambda n: one("a", n), lambda n: one("b", n)], 2)
    assert "".join(name for name, _ in asked) == "ab" + "abba" + "baab"
    assert [number for _, number in asked] == list(range(10))
    assert taken[0] == [Cost(2.0 + 5.0, 70.0), Cost(7.0 + 8.0, 150.0)]
    assert taken[0] == taken[1]  # what changes evenly is the same for both


def test_the_interval_of_a_median_holds_the_middle_19_of_20() -> None:
    twelve = [float(number) for number in (5, 3, 9, 1, 12, 7, 2, 11, 4, 10, 8, 6)]
    assert median_interval(twelve) == (3.0, 10.0)
    assert median_interval([2.0, 1.0, 3.0]) == (1.0, 3.0)  # too few to leave any out
    for count in range(6, 60):
        low, high = median_interval([float(number) for number in range(count)])
        outside = 2 * sum(math.comb(count, k) for k in range(int(low) + 1)) / 2**count
        closer = 2 * sum(math.comb(count, k) for k in range(int(low) + 2)) / 2**count
        assert outside <= 0.05 < closer
        assert low + high == count - 1


def test_costs_are_compared_round_with_round() -> None:
    figures = beside([Cost(2.0, 3.0), Cost(40.0, 10.0)], [Cost(1.0, 3.0), Cost(20.0, 8.0)])
    assert (figures["ratio"], figures["lowest"], figures["highest"]) == (2.0, 2.0, 2.0)
    assert figures["cpu"] == {
        "ratio": pytest.approx(1.125),
        "lowest": 1.0,
        "highest": 1.25,
    }
