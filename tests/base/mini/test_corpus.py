import json
import re
from itertools import islice
from random import Random

import pytest

from base.mini import corpus, facts, python_docs, tasks
from base.mini.names import is_held_out, pool


def _texts(seed: str, count: int = 3000, split: str = "train") -> list[str]:
    assert split in ("train", "held_out")
    stream = corpus.documents(seed, split, 1.0)  # type: ignore[arg-type]
    return ["".join(piece.text for piece in document) for document in islice(stream, count)]


@pytest.fixture(scope="module")
def training_text() -> str:
    return "\n".join(_texts("7"))


def test_a_seed_fixes_the_documents() -> None:
    assert _texts("3", 300) == _texts("3", 300)
    assert _texts("3", 300) != _texts("4", 300)


def test_held_out_names_never_occur_in_training_text(training_text: str) -> None:
    found = set(re.findall(r"[A-Z][a-z]+", training_text))
    held_out = {
        n for kind in ("person", "place", "river", "country") for n in pool(kind, "held_out")
    }
    found |= set(re.findall(r"[A-Z][a-z]+", "\n".join(python_docs.paragraphs("train"))))
    assert found & set(pool("person", "train"))
    assert not found & held_out


def test_held_out_items_use_held_out_names_only() -> None:
    known = set(pool("person", "train")) | set(pool("place", "train"))
    text = "\n".join(
        "".join(piece.text for piece in facts.document(Random(str(i)), "held_out", 1.0))
        for i in range(300)
    )
    assert not set(re.findall(r"[A-Z][a-z]+", text)) & known


def test_held_out_korean_names_never_occur_in_training_text(training_text: str) -> None:
    names = {
        found
        for found in re.findall(r"([가-힣]{3})(?:은|는|의) ", training_text)
        if found[0] in "김이박최정강조윤장임한오서신권황안송류홍"
    }
    people = {
        name for name in names if name[1:] in ["민수", "지영", "영희", "철수", "수진", "현우"]
    }
    assert people
    assert not any(map(is_held_out, people))


@pytest.mark.parametrize(
    "reserved",
    ["cipher", "caesar", "encrypt", '"issue"', '"priority"', '"product"', "알맞은", "골라"],
)
def test_reserved_tasks_are_absent(training_text: str, reserved: str) -> None:
    made = "\n".join(t for t in training_text.split("\n") if "<|im_" in t or ": " in t)
    assert reserved not in made.lower()


def test_an_answer_is_a_span_of_its_passages_or_says_that_they_lack_it() -> None:
    for i in range(400):
        document = facts.document(Random(str(i)), "train", 1.0)
        text = "".join(piece.text for piece in document).lower()
        for piece in document:
            if not piece.weight:
                continue
            answer = piece.text.removesuffix("<|im_end|>").strip()
            assert answer == facts.UNKNOWN or text.count(answer.lower()) >= 2


def test_unanswerable_questions_are_a_modest_share() -> None:
    answers = [
        piece.text
        for i in range(400)
        for piece in facts.document(Random(str(i)), "train", 1.0)
        if piece.weight
    ]
    share = sum(facts.UNKNOWN in answer for answer in answers) / len(answers)
    assert 0.03 < share < 0.15


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_a_task_depends_on_its_random_source_only(name: str) -> None:
    task = tasks.TASKS[name][0]
    turns = [task(Random(str(i)), "train", 1.0) for i in range(60)]
    assert turns == [task(Random(str(i)), "train", 1.0) for i in range(60)]
    assert len(set(turns)) > 5
    assert all(turn.assistant == turn.assistant.strip() != "" for turn in turns)


def test_answers_of_small_tasks_are_right() -> None:
    for i in range(200):
        turn = tasks.reverse(Random(str(i)), "train", 1.0)
        asked = turn.user.split(": ")[1].split()
        assert turn.assistant.split() == asked[::-1]
        turn = tasks.count_words(Random(str(i)), "train", 1.0)
        assert int(turn.assistant) == len(turn.user.split("? ")[1].split())
        turn = tasks.to_json(Random(str(i)), "train", 1.0)
        assert all(str(value) in turn.user for value in json.loads(turn.assistant).values())
        turn = tasks.arithmetic(Random(str(i)), "train", 1.0)
        a, b = map(int, re.findall(r"\d+", turn.user))
        plain = {"+": a + b, "plus": a + b, "-": a - b, "minus": a - b, "×": a * b, "times": a * b}
        assert int(turn.assistant) == next(v for k, v in plain.items() if f" {k} " in turn.user)
