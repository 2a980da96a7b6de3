"""How a sum is written, and what identifies it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.compose import Part, Term, check_terms, composed_digest, parse_terms, sum_of
from adapters.errors import InvalidAdapter
from tests.adapters.test_manifest import MANIFEST

DIGESTS = ["a" * 64, "b" * 64, "c" * 64]


def part(digest: str, weight: float) -> Part:
    return Part(replace(MANIFEST, digest=digest), weight)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("support", [("support", 1.0)]),
        ("a:0.7,b:0.3", [("a", 0.7), ("b", 0.3)]),
        ("a@2:-1, b@prod", [("a@2", -1.0), ("b@prod", 1.0)]),
        (f"sha256:{DIGESTS[0]}", [(f"sha256:{DIGESTS[0]}", 1.0)]),
        (f"sha256:{DIGESTS[0]}:2e-1,c", [(f"sha256:{DIGESTS[0]}", 0.2), ("c", 1.0)]),
    ],
)
def test_terms(text: str, terms: list[tuple[str, float]]) -> None:
    assert parse_terms(text) == tuple(Term(*term) for term in terms)


@pytest.mark.parametrize(
    ("text", "says"), [("a,,b", "names no adapter"), (":1", "names no"), ("a:half", "'half'")]
)
def test_no_terms(text: str, says: str) -> None:
    with pytest.raises(InvalidAdapter, match=says):
        parse_terms(text)


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf"), 101.0, -101.0])
def test_weights_that_mean_nothing(weight: float) -> None:
    with pytest.raises(InvalidAdapter, match="weight of a is"):
        check_terms([Term("a", weight)])


def test_too_many_parts() -> None:
    with pytest.raises(InvalidAdapter, match="17 parts, limit 16"):
        check_terms([Term("a")] * 17)


@given(
    pairs=st.lists(st.tuples(st.sampled_from(DIGESTS), st.floats(-2, 2)), min_size=1, max_size=6),
    data=st.data(),
)
def test_the_order_does_not_matter(pairs: list[tuple[str, float]], data: st.DataObject) -> None:
    """Of parts with weights that add exactly, so that only the order is in question."""
    parts = [part(digest, round(weight * 8) / 8) for digest, weight in pairs]
    shuffled = data.draw(st.permutations(parts))
    one, other = sum_of(parts), sum_of(shuffled)
    assert one == other
    assert composed_digest(one) == composed_digest(other)


def test_every_weight_and_part_matters() -> None:
    sums = [
        (part(DIGESTS[0], 0.7), part(DIGESTS[1], 0.3)),
        (part(DIGESTS[0], 0.3), part(DIGESTS[1], 0.7)),
        (part(DIGESTS[0], 0.7), part(DIGESTS[2], 0.3)),
        (part(DIGESTS[0], 0.7),),
    ]
    found = {composed_digest(one) for one in sums}
    assert len(found) == 4
    assert not found & set(DIGESTS)


def test_a_digest_that_is_there_twice_has_both_weights() -> None:
    (both,) = sum_of([part(DIGESTS[0], 0.5), part(DIGESTS[0], 0.25)])
    assert both.weight == 0.75
    assert sum_of([part(DIGESTS[0], 0.5), part(DIGESTS[0], -0.5)]) == ()
