from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from training.errors import DataError
from training.study.config import TableConfig, TaskConfig
from training.study.material import Material, make_material

LABELS = {"0": "부정", "1": "긍정"}


def reviews(path: Path, count: int, start: int = 0) -> Path:
    """In NSMC's form: a quotation mark stands alone, and a review may be empty."""
    lines = ["id\tdocument\tlabel", '1\t"와... 최고\t1', "2\t\t0"]
    lines += [
        f"{n}\t영화 {n} {'좋아요' if n % 2 else '별로'}\t{n % 2}" for n in range(start, count)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def table(train: Path, test: Path | None = None, **fields: object) -> TableConfig:
    return TableConfig.model_validate(
        {
            "train": train,
            "test": test,
            "text": "document",
            "label": "label",
            "choices": LABELS,
            "question": "리뷰: {text}",
            "quotes": False,
            **fields,
        }
    )


def of_table(given: TableConfig, **sizes: int) -> TaskConfig:
    small = {"train_items": 50, "validation_items": 5, "test_items": 20, **sizes}
    return TaskConfig(name="nsmc", metric="accuracy", table=given, **small)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["cipher", "facts", "manual", "particles"])
def test_no_question_is_in_two_lists_and_files_give_them_back(task: str, tmp_path: Path) -> None:
    config = TaskConfig(
        name=task, metric="exact_match", train_items=1500, validation_items=100, test_items=500
    )
    made = make_material(config)
    lists = [made.train, made.validation, made.test]
    assert [len(each) for each in lists] == [1500, 100, 500]
    asked = [{item.question or item.answer for item in each} for each in lists]
    assert not any(a & b for a, b in itertools.combinations(asked, 2))
    made.write(tmp_path)
    assert Material.read(tmp_path) == made


def test_a_task_without_so_many_items_is_refused() -> None:
    config = TaskConfig(name="facts", metric="exact_match", train_items=5000)
    with pytest.raises(DataError, match=r"task facts: facts: .* items of train were found"):
        make_material(config)


def test_reviews_are_read_as_they_are(tmp_path: Path) -> None:
    made = make_material(of_table(table(reviews(tmp_path / "ratings_train.txt", 200))))
    every = [*made.train, *made.validation, *made.test]
    assert all(item.choices == ("부정", "긍정") for item in every)
    for item in every:
        good = "좋아요" in item.question or "최고" in item.question
        assert item.answer == ("긍정" if good else "부정")
    assert not any(item.question == "리뷰: " for item in every)


def test_a_test_file_loses_what_was_trained_on(tmp_path: Path) -> None:
    train = reviews(tmp_path / "train.tsv", 100)
    test = reviews(tmp_path / "test.tsv", 160, start=80)
    made = make_material(of_table(table(train, test)))
    seen = {item.question for item in (*made.train, *made.validation)}
    assert len(made.test) == 20
    assert not seen & {item.question for item in made.test}


def test_a_quotation_mark_that_opens_nothing_needs_the_switch(tmp_path: Path) -> None:
    path = reviews(tmp_path / "train.tsv", 100)
    with pytest.raises(DataError, match=r"train\.tsv:2"):
        make_material(of_table(table(path, quotes=True)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"label": "stars"}, "no column 'stars'"),
        ({"choices": {"0": "부정", "2": "긍정"}}, "label '1' is none of"),
    ],
)
def test_a_table_that_does_not_fit_is_named(
    fields: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = reviews(tmp_path / "train.tsv", 100)
    with pytest.raises(DataError, match=said):
        make_material(of_table(table(path, **fields)))
