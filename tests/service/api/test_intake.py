"""A template's sampling, and what a request says of its own."""

from __future__ import annotations

from typing import Any

import pytest

from service.api.intake import Order, with_defaults
from service.engine.request import Sampling


@pytest.mark.parametrize(
    ("said", "defaults", "expected"),
    [
        ({}, {"temperature": 0.3}, {"do_sample": True, "temperature": 0.3}),
        ({}, {"temperature": 0.3, "do_sample": False}, {"do_sample": False}),
        ({}, {"stop": ["x"], "top_k": 5}, {"stop": ("x",), "top_k": 5, "do_sample": True}),
        ({}, {"repetition_penalty": 2.0}, {"do_sample": False, "repetition_penalty": 2.0}),
        # Who asks for greedy, or for another temperature, gets that.
        ({"do_sample": False}, {"temperature": 0.3}, {"do_sample": False}),
        (
            {"do_sample": True, "top_p": 0.5},
            {"do_sample": False},
            {"do_sample": True, "top_p": 0.5},
        ),
    ],
)
def test_defaults_fill_in_what_is_not_said(
    said: dict[str, Any], defaults: dict[str, Any], expected: dict[str, Any]
) -> None:
    order = Order(
        prompt="", sampling=Sampling(**{"do_sample": False, **said}), given=frozenset(said)
    )
    found = with_defaults(order, {k: v for k, v in defaults.items() if k not in said}).sampling
    assert {name: getattr(found, name) for name in expected} == expected


def test_a_request_for_few_tokens_lowers_the_least() -> None:
    defaults = {"max_new_tokens": 20, "min_new_tokens": 10}
    plain = with_defaults(Order(prompt="", sampling=Sampling()), defaults)
    assert (plain.max_new_tokens, plain.sampling.min_new_tokens) == (20, 10)
    few = Order(
        prompt="", sampling=Sampling(), max_new_tokens=4, given=frozenset({"max_new_tokens"})
    )
    found = with_defaults(few, {"min_new_tokens": 10})
    assert (found.max_new_tokens, found.sampling.min_new_tokens) == (4, 4)
