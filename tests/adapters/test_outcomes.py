"""What is remembered of requests, and for how long; sums that survive what is forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.catalog import Catalog
from adapters.outcomes import Outcome, Outcomes
from tests.adapters.test_manifest import MANIFEST

ONE = Outcome("r0", "support", "prod", 1, 100.0, "completed", 7, 3, 0.5, 2.0)


def with_alias(catalog: Catalog) -> Catalog:
    catalog.add(replace(MANIFEST, name="support", version=0))
    catalog.set_alias("support", "prod", {1: 1.0})
    return catalog


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = with_alias(Catalog(str(tmp_path / "catalog.db")))
    yield catalog
    catalog.close()


@pytest.fixture
def outcomes(catalog: Catalog) -> Outcomes:
    return Outcomes(catalog)


def test_requests_add_up(outcomes: Outcomes) -> None:
    outcomes.record([ONE, replace(ONE, request_id="r1", first_token=1.5, seconds=4.0)])
    outcomes.record([replace(ONE, request_id="r2", ending="failed", generated_tokens=1)])
    outcomes.record([replace(ONE, request_id="r3", ending="cancelled", version=2)])
    found = outcomes.totals("support", "prod")
    assert set(found) == {1, 2}
    one = found[1]
    assert (one.requests, one.failed, one.completed, one.generated_tokens) == (3, 1, 2, 7)
    assert (one.first_token_sum, one.first_token_squares) == (2.0, 2.5)
    assert (one.seconds_sum, one.seconds_squares) == (6.0, 20.0)
    assert (found[2].cancelled, found[2].seconds_sum) == (1, 0.0), "a time cut short is no time"
    assert outcomes.totals("support", "beta") == {}


def test_feedback_replaces_feedback(outcomes: Outcomes) -> None:
    outcomes.record([ONE, replace(ONE, request_id="r1")])
    first = outcomes.score("r0", 1.0, "good")
    assert first is not None
    assert (first.version, first.replaced) == (1, None)
    outcomes.score("r1", 0.25, None)
    again = outcomes.score("r0", 0.5, None)
    assert again is not None
    assert again.replaced == 1.0
    found = outcomes.totals("support", "prod")[1]
    assert (found.scored, found.binary) == (2, 0)
    assert (found.score_sum, found.score_squares) == (0.75, 0.3125)
    assert outcomes.comments("support", "prod", 5) == []


def test_unknown_requests_get_no_feedback(outcomes: Outcomes) -> None:
    assert outcomes.score("nobody", 1.0, None) is None


def test_old_and_many_are_forgotten_and_still_counted(outcomes: Outcomes) -> None:
    rows = [replace(ONE, request_id=f"r{n}", finished=float(n)) for n in range(10)]
    outcomes.record(rows)
    assert outcomes.forget(before=3.0, keep=100) == 3
    assert outcomes.score("r2", 1.0, None) is None
    assert outcomes.score("r3", 1.0, "kept") is not None
    assert outcomes.forget(before=0.0, keep=4) == 3
    assert outcomes.score("r5", 1.0, None) is None
    assert outcomes.score("r6", 0.0, "later") is not None
    assert outcomes.comments("support", "prod", 1) == [(1, 0.0, "later")]
    found = outcomes.totals("support", "prod")[1]
    assert (found.requests, found.scored, found.score_sum) == (10, 2, 1.0)


def test_an_alias_that_goes_takes_its_figures(catalog: Catalog, outcomes: Outcomes) -> None:
    outcomes.record([ONE])
    catalog.drop_alias("support", "prod")
    outcomes.record([replace(ONE, request_id="r1")])  # it ran while the alias went
    assert outcomes.totals("support", "prod") == {}
    assert outcomes.score("r0", 1.0, None) is None


def test_two_catalogs_and_many_threads_lose_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "catalog.db")
    catalogs = [with_alias(Catalog(path)), Catalog(path)]
    both = [Outcomes(catalog) for catalog in catalogs]

    def one(n: int) -> None:
        both[n % 2].record([replace(ONE, request_id=f"r{n}")])
        both[1 - n % 2].score(f"r{n}", n % 2, None)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(24)))
    found = both[0].totals("support", "prod")[1]
    assert (found.requests, found.scored, found.score_sum) == (24, 24, 12.0)
    assert math.isclose(found.seconds_sum, 48.0)
    for catalog in catalogs:
        catalog.close()
