from __future__ import annotations

import json

import pytest

from training.tasks import TASKS, Task
from training.tasks.cipher import CODE, encode
from training.tasks.tickets import ISSUES, PRIORITIES, PRODUCTS


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


def test_no_question_is_in_both_splits(task: Task) -> None:
    train, test = task.items("train", 2000), task.items("test", 500)
    assert len({item.question for item in train}) == 2000
    assert len({item.question for item in test}) == 500
    assert not {item.question for item in train} & {item.question for item in test}


def test_the_seed_decides_the_items(task: Task) -> None:
    assert task.items("train", 20, seed=1) == task.items("train", 20, seed=1)
    assert task.items("train", 20, seed=1) != task.items("train", 20, seed=2)


def test_a_question_has_one_answer(task: Task) -> None:
    answers: dict[str, set[str]] = {}
    for seed in range(4):
        for item in task.items("train", 500, seed):
            answers.setdefault(item.question, set()).add(item.answer)
    assert {len(each) for each in answers.values()} == {1}


def test_the_cipher_can_be_read_back() -> None:
    assert len(set(CODE.values())) == len(CODE)
    assert not set(CODE.values()) & set(CODE)
    assert encode("the red fox sees a moon at night") == "ul vuma brilo jarra bo chalu zu khema"


def test_a_ticket_says_what_its_answer_claims() -> None:
    for item in TASKS["tickets"].items("test", 300):
        answer = json.loads(item.answer)
        assert list(answer) == ["product", "issue", "priority"]
        assert answer["product"] in item.question
        assert [product for product in PRODUCTS if product in item.question] == [answer["product"]]
        assert any(words in item.question for words in ISSUES[answer["issue"]])
        for priority in ("high", "low"):
            named = any(note in item.question for note in PRIORITIES[priority])
            assert named == (answer["priority"] == priority)
