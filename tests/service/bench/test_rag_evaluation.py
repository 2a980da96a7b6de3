"""The questions are about people never seen, their answers stand in their documents, and the tests
of significance are what their names say."""

from __future__ import annotations

import math
import re

import pytest

from adapters.prompts.quotation import SYSTEM
from base.mini.names import is_held_out, pool
from service.bench.rag_evaluation import (
    Item,
    _measured,
    _permuted,
    lessons,
    mcnemar,
    people,
    sections,
)


def test_people_are_held_out_and_the_answer_is_told_once() -> None:
    items = people(200)
    assert len({item.document for item in items}) == 200
    for item in items:
        assert is_held_out(item.document)
        assert item.document in item.question
        assert item.answer in item.text
        assert item.answer not in item.question
    assert people(200) == items, "the same questions every time"


def test_sections_do_not_begin_with_their_heading() -> None:
    items = sections(200)
    assert len(items) > 100
    assert len({item.document for item in items}) == len(items)
    assert not [item for item in items if item.question in item.text.splitlines()]


def test_mcnemar_is_the_exact_binomial() -> None:
    one = [True] * 9 + [False] + [True] * 5
    other = [False] * 9 + [True] + [True] * 5
    assert mcnemar(one, other) == pytest.approx(2 * (1 + 10) / 2**10, abs=1e-6)
    assert mcnemar(one, one) == 1.0


def test_the_permutation_test_sees_what_is_there_and_nothing_else() -> None:
    assert _permuted([0.1] * 8, [0.1] * 8) == 1.0
    assert _permuted([1.0] * 30, [0.0] * 30) < 0.001
    # Eight equal differences: both ends of 2**8 sign patterns.
    assert _permuted([1.0] * 8, [0.5] * 8) == pytest.approx(2 / 2**8, abs=0.003)


def test_rankings_are_measured_by_the_place_of_the_right_document() -> None:
    pytest.importorskip("ir_measures", reason="needs the extra rag")
    items = [Item("a", "", "?"), Item("b", "", "?"), Item("c", "", "?")]
    ranked = {"q0": {"a": 1.0}, "q1": {"x": 1.0, "b": 0.5}, "q2": {"x": 1.0}}
    found = _measured(items, ranked)
    assert found["Recall@5"] == [1.0, 1.0, 0.0]
    assert found["MRR@10"] == [1.0, 0.5, 0.0]
    assert found["nDCG@10"] == pytest.approx([1.0, 1 / math.log2(3), 0.0])


def test_lessons_are_about_other_people_in_the_prompt_that_is_served() -> None:
    rows = list(lessons(250))
    assert len(rows) == 250
    names = {item.document for item in people(200)}
    for row in rows:
        system, user, answer = (message["content"] for message in row["messages"])
        assert system == SYSTEM
        passages, question = user.removeprefix("Passages:\n").split("\n\nQuestion: ")
        shown = [line.split("] ")[1] for line in passages.splitlines()]
        assert [line[:4] for line in passages.splitlines()] == ["[1] ", "[2] ", "[3] "]
        assert not names & set(re.findall(r"\w+", user))
        told = [text for text in shown if set(question.rstrip("?").split()) & names_of(text)]
        assert any(answer in text for text in told), row


def names_of(text: str) -> set[str]:
    return {word for word in re.findall(r"[A-Z]\w+", text) if word in pool("person", "train")}
