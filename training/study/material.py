"""What a task's arms learn from and are asked: made once, kept as files, the same for all arms."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training.data import read_rows
from training.errors import DataError
from training.study.config import TableConfig, TaskConfig
from training.tasks import TASKS, Item
from training.tasks.task import TEST_PART

VALIDATION_PART = 8  # one in eight of the training split chooses the learning rate


@dataclass(frozen=True, slots=True)
class Material:
    """The items of one task. No question is in two of the three lists."""

    train: list[Item]
    validation: list[Item]
    test: list[Item]
    passages: list[str]  # what retrieval searches; empty where it is to search `train`

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "validation", "test"):
            lines = (json.dumps(asdict(item), ensure_ascii=False) for item in getattr(self, name))
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = json.dumps(self.passages, ensure_ascii=False, indent=0)
        (folder / "passages.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Material:
        passages = json.loads((folder / "passages.json").read_text(encoding="utf-8"))
        train, validation, test = (
            _read(folder / f"{name}.jsonl") for name in ("train", "validation", "test")
        )
        return cls(train, validation, test, passages)


def _read(path: Path) -> list[Item]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        found.append(Item(**{**fields, "choices": tuple(fields["choices"])}))
    return found


def make_material(config: TaskConfig) -> Material:
    """The items of `config`. Raises DataError where the task has not so many."""
    if config.table is not None:
        return _of_table(config, config.table)
    task = TASKS[config.source]
    wanted = config.train_items + config.validation_items
    try:
        test = task.items("test", config.test_items)
        while True:  # one in eight validates, more or less
            rest = task.items("train", wanted)
            validation = sum(map(_validates, rest))
            lacking = max(
                config.validation_items - validation,
                config.train_items - (len(rest) - validation),
            )
            if lacking <= 0:
                return _material(config, rest, test, list(task.passages))
            wanted += lacking
    except ValueError as error:
        raise DataError(f"task {config.name}: {error}") from None


def _material(
    config: TaskConfig, rest: Sequence[Item], test: Sequence[Item], passages: list[str]
) -> Material:
    validation = [item for item in rest if _validates(item)]
    train = [item for item in rest if not _validates(item)]
    wanted = {
        "train_items": (config.train_items, train),
        "validation_items": (config.validation_items, validation),
        "test_items": (config.test_items, test),
    }
    for name, (count, found) in wanted.items():
        if len(found) < count:
            raise DataError(f"task {config.name}: {name} is {count}, there are {len(found)}")
    return Material(
        train[: config.train_items],
        validation[: config.validation_items],
        list(test[: config.test_items]),
        passages,
    )


def _validates(item: Item) -> bool:
    """By another byte of the hash than the one that makes the test split."""
    digest = hashlib.sha256((item.question or item.answer).encode()).digest()
    return digest[1] % VALIDATION_PART == 0


def _of_table(config: TaskConfig, table: TableConfig) -> Material:
    """Questions are shuffled by a fixed seed, so that a file sorted by label does no harm."""
    found = _distinct(_labelled(table.train, table))
    if table.test is None:
        test = [item for item in found if item.split == "test"]
        rest = [item for item in found if item.split == "train"]
    else:
        asked = {item.question for item in found}
        test = [i for i in _distinct(_labelled(table.test, table)) if i.question not in asked]
        rest = found
    chance = random.Random("table")
    chance.shuffle(rest)
    chance.shuffle(test)
    if not test:
        part = f"one row in {TEST_PART}" if table.test is None else str(table.test)
        raise DataError(f"task {config.name}: {part} is the test split, and it is empty")
    return _material(config, rest, test, [])


def _distinct(items: Iterable[Item]) -> list[Item]:
    """One item for each question: the first."""
    found: dict[str, Item] = {}
    for item in items:
        found.setdefault(item.question, item)
    return list(found.values())


def _labelled(path: Path, table: TableConfig) -> Iterator[Item]:
    """Rows without a text are left out, as NSMC has a few. Raises DataError at an unknown label."""
    choices = tuple(table.choices.values())
    for place, row in _plain_rows(path) if not table.quotes else read_rows(path):
        for column in (table.text, table.label):
            if column not in row:
                raise DataError(f"{place}: no column {column!r}; there are {sorted(row)}")
        text, label = str(row[table.text]).strip(), str(row[table.label])
        if label not in table.choices:
            raise DataError(f"{place}: label {label!r} is none of {sorted(table.choices)}")
        if text:
            yield Item(table.question.replace("{text}", text), table.choices[label], choices)


def _plain_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Tab-separated lines in which a quotation mark is a character like any other."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = next(reader, [])
            for cells in reader:
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}:{reader.line_num}: {len(cells)} fields, the header has "
                        f"{len(header)}: {header}"
                    )
                yield f"{path}:{reader.line_num}", dict(zip(header, cells, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: {error}") from None
