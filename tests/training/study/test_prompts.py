from __future__ import annotations

import pytest

from base.load import Base, load_base
from base.mini import MINI
from training.data import Example
from training.study.bm25 import Bm25, terms
from training.study.config import Reference, TaskConfig
from training.study.material import Material, make_material
from training.study.prompts import Prompts
from training.tasks.facts import WORDINGS

SIZES = {"train_items": 30, "validation_items": 2, "test_items": 5}


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(MINI, dtype="float32")


def made(name: str) -> tuple[TaskConfig, Material]:
    config = TaskConfig(name=name, metric="exact_match", shots=3, passages=2, **SIZES)  # type: ignore[arg-type]
    return config, make_material(config)


def text(base: Base, example: Example) -> tuple[str, str]:
    """Prompt and answer."""
    decode = base.tokenizer.decode
    at = example.answer_start
    return decode(example.tokens[:at]), decode(example.tokens[at:])


@pytest.mark.parametrize("style", ["zero_shot", "few_shot", "gold_context", "bm25"])
def test_the_answer_is_the_same_whatever_stands_before_it(base: Base, style: Reference) -> None:
    for name in ("facts", "manual", "particles"):
        config, material = made(name)
        plain, other = Prompts(base, config, material), Prompts(base, config, material, style)
        for item in material.test:
            a, b = plain.example(item), other.example(item)
            assert a.tokens[a.answer_start :] == b.tokens[b.answer_start :]


def test_few_shot_shows_answered_training_items_only(base: Base) -> None:
    config, material = made("facts")
    prompt, _ = text(base, Prompts(base, config, material, "few_shot").example(material.test[0]))
    for item in material.train[:3]:
        assert item.question in prompt
    assert prompt.count("<|im_start|>assistant") == 4
    assert prompt.rstrip().endswith("<|im_start|>assistant")


def test_gold_context_and_retrieval_put_the_fact_before_the_question(base: Base) -> None:
    config, material = made("facts")
    gold = Prompts(base, config, material, "gold_context")
    retrieved = Prompts(base, config, material, "bm25")
    hits = 0
    for item in material.test:
        assert f"{item.passage}\n\n{item.question}" in text(base, gold.example(item))[0]
        prompt, _ = text(base, retrieved.example(item))
        assert prompt.count("The ") >= 2
        hits += item.passage in prompt
    assert hits >= 4


def test_bm25_finds_the_fact_that_a_question_is_about() -> None:
    _, material = made("facts")
    index = Bm25(material.passages)
    found = [material.passages[index.top(item.question, 1)[0]] for item in material.test]
    assert sum(f == item.passage for f, item in zip(found, material.test, strict=True)) >= 4
    assert len(WORDINGS) > 10  # whatever the wording


def test_bm25_prefers_rare_words_and_short_passages() -> None:
    index = Bm25(["the cat", "the dog and the cat of the house", "the rare cat", "a dog"])
    assert index.top("rare", 4) == [2]
    assert index.top("cat", 4) == [0, 2, 1]
    assert index.top("nothing", 4) == []
    assert index.top("dog cat", 2) == index.top("cat dog", 2)


def test_korean_is_found_by_its_syllables() -> None:
    assert {"사", "과", "사과"} <= set(terms("사과를"))
    assert Bm25(["포도를 먹다", "사과가 있다"]).top("사과는", 1) == [1]
