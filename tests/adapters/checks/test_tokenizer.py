"""What an adapter's own tokenizer may say, and what is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from adapters.checks.tokenizer import MAX_PADDING, check_tokenizer
from adapters.errors import InvalidAdapter, TooLarge
from adapters.limits import Limits
from adapters.vocabulary import Tokens
from tests.oracle import VOCABULARY, _tokenizer

LIMITS = Limits()


@cache
def base() -> Tokens:
    return Tokens.of(_tokenizer())


def with_tokens(*names: str) -> bytes:
    made = _tokenizer()
    made.add_tokens(list(names))
    return bytes(made.backend_tokenizer.to_str(), "utf-8")


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(with_tokens("<a>", "<b>"))
    edit(content)
    return json.dumps(content).encode()


def check(own: bytes | None, rows: int = VOCABULARY + 2, limits: Limits = LIMITS) -> bool:
    return check_tokenizer(replace(base(), own=own), rows, VOCABULARY, limits)


def test_new_tokens_are_kept_and_the_bases_own_are_not() -> None:
    assert check(with_tokens("<a>", "<b>"))
    assert not check(with_tokens(), VOCABULARY)
    assert not check(None, VOCABULARY)


def test_a_resized_vocabulary_needs_its_tokenizer_and_says_how() -> None:
    with pytest.raises(InvalidAdapter, match="part 'tokenizer'") as caught:
        check(None)
    assert caught.value.where == "tokenizer"
    assert f"from {VOCABULARY} to {VOCABULARY + 2}" in caught.value.reason


def test_a_cut_vocabulary_keeps_every_token_of_the_bases() -> None:
    with pytest.raises(InvalidAdapter, match=f"cut to {VOCABULARY - 1} rows"):
        check(None, VOCABULARY - 1)
    fewer = {text: i for text, i in base().base.items() if i < VOCABULARY - 8}
    tokens = replace(base(), base=fewer)
    assert not check_tokenizer(tokens, VOCABULARY - 8, VOCABULARY, LIMITS)


def test_tokens_in_the_padding_of_the_bases_tables_need_no_resizing() -> None:
    fewer = {text: i for text, i in base().base.items() if i < VOCABULARY - 1}
    tokens = Tokens(fewer, base().parts, with_tokens())
    assert check_tokenizer(tokens, VOCABULARY, VOCABULARY, LIMITS)


def _swap(content: dict[str, Any]) -> None:
    added = content["added_tokens"]
    added[3]["content"], added[4]["content"] = added[4]["content"], added[3]["content"]
    vocabulary = content["model"]["vocab"]
    names = [added[3]["content"], added[4]["content"]]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]


def _pattern(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }


def _around(content: dict[str, Any]) -> None:
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [9999], "tokens": ["<s>"]}},
    }


@pytest.mark.parametrize(
    ("own", "rows", "reason"),
    [
        (b"{}", VOCABULARY + 2, "no tokenizer.json"),
        (b"\x80\x04", VOCABULARY + 2, "no tokenizer.json"),
        (b"[" * 100_000, VOCABULARY + 2, "no tokenizer.json"),
        (edited(_swap), VOCABULARY + 2, "must mean the same"),
        (edited(_pattern), VOCABULARY + 2, "regular expression"),
        (edited(_around), VOCABULARY + 2, "puts id 9999 around a text"),
        (with_tokens("<a>", "<b>", "<c>"), VOCABULARY + 2, f"'<c>' has id {VOCABULARY + 2}"),
        (with_tokens("<a>"), VOCABULARY + 2 + MAX_PADDING, "new rows have no token"),
    ],
)
def test_what_cannot_be_served_is_refused(own: bytes, rows: int, reason: str) -> None:
    with pytest.raises(InvalidAdapter, match=reason) as caught:
        check(own, rows)
    assert caught.value.where == "tokenizer"


def test_padded_rows_need_no_token() -> None:
    assert check(with_tokens("<a>"), VOCABULARY + 64)


def test_size_is_bounded() -> None:
    with pytest.raises(TooLarge, match="limit 10"):
        check(with_tokens("<a>", "<b>"), limits=Limits(max_tokenizer_bytes=10))
