from __future__ import annotations

import json
import random

import pytest

from training.tasks import TASKS, Item, Task
from training.tasks.cipher import CODE, encode
from training.tasks.facts import RELATIONS, TABLE
from training.tasks.particles import closed
from training.tasks.records import STATES
from training.tasks.tickets import ISSUES, PRIORITIES, PRODUCTS


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


def key(item: Item) -> str:
    return item.question or item.answer


def test_no_question_is_in_both_splits(task: Task) -> None:
    train, test = task.items("train", 2000), task.items("test", 500)
    assert len({key(item) for item in train}) == 2000
    assert len({key(item) for item in test}) == 500
    assert not {key(item) for item in train} & {key(item) for item in test}


def test_the_seed_decides_the_items(task: Task) -> None:
    assert task.items("train", 20, seed=1) == task.items("train", 20, seed=1)
    assert task.items("train", 20, seed=1) != task.items("train", 20, seed=2)


def test_a_question_has_one_answer(task: Task) -> None:
    answers: dict[str, set[str]] = {}
    for seed in range(4):
        for item in task.items("train", 500, seed):
            answers.setdefault(key(item), set()).add(item.answer)
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


def test_a_task_without_enough_items_says_so() -> None:
    few = Task("few", "", "", lambda chance: Item(f"{chance.randint(0, 9)}?", "yes"))
    with pytest.raises(ValueError, match=r"few: \d items of train were found, not 40"):
        few.items("train", 40)


def test_a_record_keeps_every_field_in_its_new_place() -> None:
    for item in TASKS["records"].items("test", 200):
        fields = dict(
            part.split(": ") for part in item.question.removeprefix("Record: ").split("; ")
        )
        answer = json.loads(item.answer)
        assert list(answer) == ["who", "of", "at", "ok"]
        assert answer["at"] == [fields["city"], int(fields["age"])]
        assert (answer["who"], answer["of"]) == (fields["name"], fields["job"])
        assert answer["ok"] is STATES[fields["state"]]


def test_every_fact_is_learnt_in_some_words_and_asked_in_others() -> None:
    assert len(TABLE) == 200
    assert len(TASKS["facts"].passages) == 200
    train, test = TASKS["facts"].items("train", 2000), TASKS["facts"].items("test", 500)
    assert {item.passage for item in test} <= {item.passage for item in train}
    for item in test:
        assert item.answer in RELATIONS[item.passage.split()[1]]
        assert item.passage.endswith(f"is {item.answer}.")


@pytest.mark.parametrize(
    ("word", "ends"), [("사과", False), ("밥", True), ("달", True), ("나", False)]
)
def test_final_consonants_are_found(word: str, ends: bool) -> None:
    assert closed(word) is ends


def test_a_particle_is_one_of_its_choices_by_the_rule() -> None:
    for item in TASKS["particles"].items("test", 300):
        word = item.question.split(": ")[1]
        assert item.answer == item.choices[0 if closed(word) else 1]


def test_a_manual_page_is_a_document() -> None:
    item = TASKS["manual"].make(random.Random(0))
    assert item.row == {"text": item.answer}
    command = item.answer.split()[0]
    assert item.answer.count(command) == 2
