from __future__ import annotations

import json

import pytest

from training.evaluation.texts import (
    accuracy_and_f1,
    chrf,
    exact,
    field_match,
    is_json,
    rouge_l,
)


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        # Lin (2004), section 3.1: "police killed the gunman" is the reference.
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("the the the", "the cat", 2 / 5),
        ("The CAT.", "the cat", 1.0),
        ("", "the cat", 0.0),
        ("나는 사과를 먹었다", "나는 밥을 먹었다", 2 / 3),  # where rouge-score says 0
    ],
)
def test_rouge_l_is_the_f_of_the_longest_common_subsequence(
    said: str, wanted: str, score: float
) -> None:
    assert rouge_l(said, wanted) == pytest.approx(score)
    assert rouge_l(wanted, said) == pytest.approx(score)


def test_chrf_is_of_characters() -> None:
    whole, each = chrf(["the cat sat", "no"], ["the cat sat", "yes"])
    assert each == [pytest.approx(1.0), pytest.approx(0.0)]
    assert 0.5 < whole < 1.0
    near, far = chrf(["고양이가", "강아지가"], ["고양이는", "고양이는"])[1]
    assert near > 0.3 > far


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ('{"a": 1, "b": {"c": [2, 3]}}', 1.0),
        ('{"b": {"c": [2, 3]}, "a": 1}', 1.0),  # the order of keys says nothing
        ('{"a": 1, "b": {"c": [3, 2]}}', 1 / 3),  # that of a list does
        ('{"a": 1}', 0.5),
        ('{"a": 1, "b": {"c": [2, 3]}, "d": 4}', 6 / 7),
        ('{"a": "1", "b": {"c": [2, 3]}}', 2 / 3),
        ("a: 1", 0.0),
        ('{"a": NaN}', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_a_field_is_its_path_and_its_value(said: str, score: float) -> None:
    assert field_match(said, '{"a": 1, "b": {"c": [2, 3]}}') == pytest.approx(score)


def test_empty_values_are_fields_too() -> None:
    assert field_match('{"a": {}}', '{"a": []}') == 0.0
    assert field_match('{"a": {}}', '{"a": {}}') == 1.0


def test_json_is_what_the_standard_says() -> None:
    assert is_json(json.dumps({"a": [1, None, "é"]}))
    assert not is_json("{'a': 1}")
    assert not is_json('{"a": Infinity}')


def test_exact_is_to_the_letter_but_for_blanks_around_it() -> None:
    assert exact(" Tovan\n", "Tovan") == 1.0
    assert exact("tovan", "Tovan") == 0.0


def test_macro_f1_counts_rare_labels_as_much_as_frequent_ones() -> None:
    wanted = ["a"] * 9 + ["b"]
    assert accuracy_and_f1(wanted, wanted) == (1.0, 1.0)
    accuracy, f1 = accuracy_and_f1(["a"] * 10, wanted)
    assert (accuracy, f1) == (0.9, pytest.approx((2 * 9 / 19 + 0) / 2))
    assert accuracy_and_f1(["c"] * 10, wanted)[1] == 0.0
