"""Pieces of text join to the whole, no character is cut, and no stop string is ever sent."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from service.engine.detokenizer import Detokenizer
from tests.oracle import make_base


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    base = make_base(tmp_path_factory.mktemp("tokenizer") / "base", "llama")
    return AutoTokenizer.from_pretrained(str(base))


def pieces(tokenizer: Any, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop)
    sent = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        sent.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    sent.append(detokenizer.finish())
    return sent, detokenizer


@settings(max_examples=150)
@given(text=st.text(max_size=40))
def test_pieces_join_to_the_text(tokenizer: Any, text: str) -> None:
    sent, detokenizer = pieces(tokenizer, text)
    assert (
        "".join(sent)
        == detokenizer.text
        == tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    )


def test_no_piece_shows_half_a_character(tokenizer: Any) -> None:
    sent, _ = pieces(tokenizer, "한국어 🙂 ok")
    assert "".join(sent) == "한국어 🙂 ok"
    assert not any("�" in piece for piece in sent)


@settings(max_examples=150)
@given(
    text=st.text(alphabet="ab한", max_size=30),
    stop=st.lists(st.text(alphabet="ab한", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(
    tokenizer: Any, text: str, stop: list[str]
) -> None:
    sent, detokenizer = pieces(tokenizer, text, tuple(stop))
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    assert detokenizer.stopped == bool(ends)
    out = "".join(sent)
    assert out == detokenizer.text
    assert text.startswith(out)
    assert not any(s in out for s in stop)
    if not ends:
        assert out == text


def test_a_stop_string_over_two_tokens_is_held_back(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, ("END",))
    ids = tokenizer("xEN", add_special_tokens=False)["input_ids"]
    assert "".join(detokenizer.push(i) for i in ids) == "x"
    assert detokenizer.finish() == "EN"


def test_broken_bytes_come_out_at_last(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    first = tokenizer("한", add_special_tokens=False)["input_ids"][0]
    if tokenizer.decode([first]) != "�":
        pytest.skip("the tokenizer has a token for the whole character")
    assert detokenizer.push(first) == ""
    assert detokenizer.finish() == "�"
