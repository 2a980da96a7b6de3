"""The NSMC study as it ships, on a stand-in of invented reviews and the embedded base."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from training.study import runner
from training.study.arm import Arm, run_arm
from training.study.config import StudyConfig, read_study
from training.study.material import Material
from training.study.place import Place

SHIPPED = Path(__file__).resolve().parents[3] / "docs" / "study" / "nsmc.yaml"
THINGS = ("영화", "배우", "음악", "이야기", "화면", "결말")
WORDS = {
    "1": ("최고", "좋아요", "재미있다", "감동"),
    "0": ("별로", "지루하다", "최악", "돈 아깝다"),
}


def write_reviews(path: Path, count: int, seed: int) -> None:
    """In NSMC's form, quotation marks and an empty review among them."""
    chance = random.Random(seed)
    lines = ["id\tdocument\tlabel", f"{seed}\t\t0"]
    for number in range(count):
        label = chance.choice("01")
        words = [chance.choice(THINGS), chance.choice(WORDS[label]), str(chance.randrange(10**6))]
        quote = '"' if chance.random() < 0.2 else ""
        lines.append(f"{seed}{number}\t{quote}{' '.join(words)}\t{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """The shipped file beside a stand-in of the data; base and sizes are this machine's."""
    folder = tmp_path_factory.mktemp("nsmc")
    shutil.copy(SHIPPED, folder)
    (folder / "nsmc").mkdir()
    for seed, name in enumerate(("train", "test"), start=1):
        write_reviews(folder / "nsmc" / f"ratings_{name}.txt", 300, seed)
    found = read_study(folder / SHIPPED.name)
    sizes = {"train_items": 200, "validation_items": 10, "test_items": 30, "shots": 3}
    tasks = tuple(task.model_copy(update=sizes) for task in found.tasks)
    return found.model_copy(update={"base": "mini", "tasks": tasks, "tokens": 1500})


def test_the_loader_reads_reviews_and_labels(study: StudyConfig, tmp_path: Path) -> None:
    place = Place(tmp_path)
    runner.prepare(study.model_copy(update={"base": "stand-in"}), place)
    material = Material.read(place.material("nsmc"))
    assert (len(material.train), len(material.test)) == (200, 30)
    every = [*material.train, *material.validation, *material.test]
    for item in every:
        label = "1" if item.answer == "긍정" else "0"
        assert any(word in item.question for word in WORDS[label])
    assert any('"' in item.question for item in every)


def test_the_study_runs_on_the_stand_in(study: StudyConfig, tmp_path: Path) -> None:
    place = Place(tmp_path)
    prepared = study.model_copy(update={"base": "stand-in"})  # whose knowledge needs no file
    runner.prepare(prepared, place)
    plain = run_arm(study, place, Arm("reference", "nsmc", "few_shot"))
    assert len(plain["test"]["right"]) == 30
    assert set(plain["test"]["said"]) <= {"긍정", "부정"}
    trained = run_arm(study, place, Arm("final", "nsmc", "lora", 1e-2, 0))
    assert trained["test"]["nats"] != plain["test"]["nats"]
    assert trained["validation_nats"] < 5.0
    assert trained["tokens"] == pytest.approx(study.tokens, rel=0.3)
