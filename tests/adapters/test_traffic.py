"""Who gets which version: shares by weight, clients that stay, and no more moves than need be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.traffic import Arm, choose
from tests.adapters.test_manifest import MANIFEST

ALIAS = "support@prod"
CLIENTS = [f"client-{n}" for n in range(400)]


def arms(*weights: float) -> list[Arm]:
    return [
        Arm(replace(MANIFEST, version=version), weight) for version, weight in enumerate(weights, 1)
    ]


def chosen(found: list[Arm], client: str | None, alias: str = ALIAS) -> int:
    return choose(found, alias, client).manifest.version


Weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@settings(max_examples=60)
@given(weights=Weights, client=st.text(min_size=1, max_size=20), data=st.data())
def test_a_client_stays(weights: list[float], client: str, data: st.DataObject) -> None:
    found = arms(*weights)
    shuffled = data.draw(st.permutations(found))
    assert chosen(found, client) == chosen(shuffled, client), "whatever the order"
    scaled = [Arm(arm.manifest, 3 * arm.weight) for arm in found]
    assert chosen(found, client) == chosen(scaled, client), "90 and 10 are 0.9 and 0.1"


@settings(max_examples=60)
@given(weights=Weights, grown=st.integers(0, 4), factor=st.floats(1, 50))
def test_only_clients_of_a_growing_arm_move(
    weights: list[float], grown: int, factor: float
) -> None:
    before = arms(*weights)
    after = arms(*(w * factor if n == grown else w for n, w in enumerate(weights)))
    for client in CLIENTS[:60]:
        was, now = chosen(before, client), chosen(after, client)
        assert now in (was, grown + 1)


@settings(max_examples=40)
@given(weights=Weights)
def test_a_new_arm_takes_clients_and_moves_no_others(weights: list[float]) -> None:
    before, after = arms(*weights), arms(*weights, 5.0)
    for client in CLIENTS[:60]:
        assert chosen(after, client) in (chosen(before, client), len(after))


def test_shares_are_the_weights() -> None:
    clients = [f"c{n}" for n in range(6_000)]
    found = Counter(chosen(arms(90, 10, 0), client) for client in clients)
    assert found[3] == 0, "a weight of 0 gets nothing"
    assert abs(found[2] / len(clients) - 0.1) < 0.012  # three standard deviations


def test_moving_ten_percent_moves_about_ten_percent() -> None:
    clients = [f"c{n}" for n in range(5_000)]
    moved = sum(chosen(arms(90, 10), c) != chosen(arms(80, 20), c) for c in clients)
    assert abs(moved / len(clients) - 0.1) < 0.02


def test_experiments_do_not_know_of_each_other() -> None:
    """The clients of one arm here are spread over both arms there."""
    here = [c for c in CLIENTS if chosen(arms(1, 1), c) == 1]
    there = Counter(chosen(arms(1, 1), c, "support@beta") for c in here)
    assert min(there.values()) > len(here) / 3


def test_without_a_client_it_is_drawn_each_time() -> None:
    found = Counter(chosen(arms(70, 30), None) for _ in range(2_000))
    assert abs(found[2] / 2_000 - 0.3) < 0.06
