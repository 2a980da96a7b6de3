from __future__ import annotations

import json

import pytest

from adapters.errors import InvalidAdapter, TooLarge
from adapters.evaluation import DEPTH, MAX_BYTES, checked


def test_an_object_is_kept_as_it_is() -> None:
    given = {"evaluations": [{"figures": {"exact_match": {"value": 0.5}}}], "이름": None}
    assert checked(json.dumps(given).encode()) == given


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[1]", "is a list"),
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": 1e999}', "holds inf"),
        (b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1), "nested deeper"),
        (b'{"a":' + b"[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_evaluation_is_refused(raw: bytes, said: str) -> None:
    with pytest.raises(InvalidAdapter, match=said):
        checked(raw)


def test_a_large_file_is_refused_before_it_is_read() -> None:
    with pytest.raises(TooLarge):
        checked(b" " * (MAX_BYTES + 1))
