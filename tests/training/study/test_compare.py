"""A study end to end on the embedded base, of a few items and steps; arms run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from training.errors import ConfigError, TrainingError
from training.study import cli, runner, serving
from training.study.arm import Arm, chance, run_arm, shuffled
from training.study.config import StudyConfig, TaskConfig
from training.study.findings import find
from training.study.material import Material
from training.study.place import Place
from training.study.schedule import next_arm
from training.tasks import TASKS

SIZES = {"train_items": 40, "validation_items": 4, "test_items": 6, "shots": 2, "passages": 2}


def small(folder: Path, **fields: Any) -> StudyConfig:
    known = folder / "known.jsonl"
    known.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    return StudyConfig.model_validate(
        {
            "name": "a small study",
            "tasks": [
                {"name": "particles", "metric": "accuracy", **SIZES},
                {"name": "manual", "metric": "nats", **SIZES},
            ],
            "methods": [{"method": {"kind": "lora", "rank": 2}, "learning_rates": [1e-3]}],
            "hypothesis": {"method": "lora", "over": "few_shot", "at_least": 2},
            "seeds": [0, 1],
            "tokens": 200,
            "batch_size": 4,
            "retention": known,
            **fields,
        }
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyConfig, Place]:
    folder = tmp_path_factory.mktemp("study")
    study, place = small(folder), Place(folder / "out")
    run_here(study, place)
    return study, place


def run_here(study: StudyConfig, place: Place) -> None:
    runner.prepare(study, place)
    (place.root / "arms").mkdir()
    while (arm := next_arm(study, runner.results(place))) is not None:
        runner.write_json(place.result(arm.id), run_arm(study, place, arm))


def test_every_arm_says_what_it_measured(ended: tuple[StudyConfig, Place]) -> None:
    study, place = ended
    findings = find(study, runner.results(place))
    assert not findings.missing
    for task in study.tasks:
        names = [row.name for row in findings.rows if row.task == task.name]
        assert names == [*study.references, "lora"]
        lora = findings.of(task.name, "lora")
        assert lora is not None
        assert (lora.seeds, lora.items) == (2, 6)
        assert lora.quality.low <= lora.quality.value <= lora.quality.high
        costs = (lora.parameters, lora.file_bytes, lora.peak_bytes, lora.tokens, lora.train_seconds)
        assert all(cost and cost > 0 for cost in costs)
        assert lora.retention is not None


@pytest.mark.slow
def test_full_fine_tuning_is_an_arm_like_others(tmp_path: Path) -> None:
    method = [
        {"method": {"kind": kind}, "learning_rates": [1e-3]} for kind in ("lora", "ia3", "full")
    ]
    study = small(tmp_path, methods=method, references=["few_shot"], controls=[], seeds=[0])
    place = Place(tmp_path / "out")
    run_here(study, place)
    findings = find(study, runner.results(place))
    for task in study.tasks:
        rows = {row.name: row for row in findings.rows if row.task == task.name}
        assert rows["lora"].tokens == rows["full"].tokens == rows["ia3"].tokens
        sizes = [rows[name].file_bytes or 0 for name in ("ia3", "lora", "full")]
        assert 0 < sizes[0] < sizes[1] < sizes[2] / 10


def test_a_fresh_adapter_is_the_base_to_the_bit(ended: tuple[StudyConfig, Place]) -> None:
    study, place = ended
    controls = find(study, runner.results(place)).controls
    fresh = [control for control in controls if control.name == "zero steps of lora"]
    assert [control.passed for control in fresh] == [True] * 2


def test_adapters_are_asked_each_others_questions(ended: tuple[StudyConfig, Place]) -> None:
    study, place = ended
    assert len(find(study, runner.results(place)).transfer) == 4


def test_the_second_seed_is_another_run(ended: tuple[StudyConfig, Place]) -> None:
    found = runner.results(ended[1])
    first, second = (found[f"manual.lora.s{seed}"] for seed in (0, 1))
    assert first["test"]["nats"] != second["test"]["nats"]
    assert first["validation_nats"] == found["manual.lora.lr0.001.s0"]["validation_nats"]


def test_the_report_is_one_page_that_fetches_nothing(ended: tuple[StudyConfig, Place]) -> None:
    study, place = ended
    cli.report(study, place, Path("study.yaml"))
    text = (place.root / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "<script" not in text
    assert text.count("<svg") == 2 * (1 + 3 + 1)  # dots, three costs and curves for each task
    found = json.loads((place.root / "report.json").read_text(encoding="utf-8"))
    assert found["verdict"]["needed"] == 2
    assert "lora" in (place.root / "report.md").read_text(encoding="utf-8")


def test_the_best_of_each_task_is_by_validation(ended: tuple[StudyConfig, Place]) -> None:
    study, place = ended
    cli.report(study, place, Path("study.yaml"))
    found = runner.results(place)
    for task in ("particles", "manual"):
        arms = [found[f"{task}.lora.s{seed}"] for seed in (0, 1)]
        best = min(arms, key=lambda arm: arm["validation_nats"])["arm"]
        kept, made = place.root / "best" / task, place.adapter(task, "lora", 1e-3, best["seed"])
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (kept / name).read_bytes() == (made / name).read_bytes()
        said = json.loads((kept / "evaluation.json").read_text(encoding="utf-8"))
        assert said["evaluations"][0]["arm"] == best["id"]


def test_another_study_does_not_go_on_in_the_same_folder(ended: tuple[StudyConfig, Place]) -> None:
    study, place = ended
    with pytest.raises(ConfigError, match="another tokens: 200, now 300"):
        runner.prepare(study.model_copy(update={"tokens": 300}), place)
    runner.prepare(study.model_copy(update={"seeds": (0, 1, 2)}), place)
    runner.prepare(study, place)


def test_shuffled_answers_stay_among_their_choices() -> None:
    items = TASKS["particles"].items("train", 300)
    dealt = shuffled(items, 0)
    assert sorted(i.answer for i in dealt) == sorted(i.answer for i in items)
    assert all(item.answer in item.choices for item in dealt)
    assert 0.3 < sum(a.answer == b.answer for a, b in zip(items, dealt, strict=True)) / 300 < 0.7
    pages = TASKS["manual"].items("train", 5)
    for page, mixed in zip(pages, shuffled(pages, 0), strict=True):
        assert sorted(page.answer.split()) == sorted(mixed.answer.split())
        assert page.answer != mixed.answer


def test_chance_is_what_the_most_frequent_answer_gets(tmp_path: Path) -> None:
    study = small(tmp_path)
    test = TASKS["facts"].items("test", 200)
    exact = TaskConfig(name="facts", metric="exact_match")
    got = chance(exact, Material([], [], test, []))
    answers = [item.answer for item in test]
    assert got == max(answers.count(answer) for answer in answers) / 200
    particles = TASKS["particles"].items("test", 400)
    assert chance(study.tasks[0], Material([], [], particles, [])) == pytest.approx(0.52, abs=0.05)


@pytest.mark.slow
def test_adapters_are_timed_where_they_are_served(ended: tuple[StudyConfig, Place]) -> None:
    study, place = ended
    file = place.root.parent / "study.yaml"
    file.write_text(json.dumps(study.model_dump(mode="json")), encoding="utf-8")  # YAML too
    arms = {path: path.stat().st_mtime_ns for path in (place.root / "arms").iterdir()}
    asked = [str(file), "--out", str(place.root), "--serving-only"]
    done = CliRunner().invoke(cli.app, asked)
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in (place.root / "arms").iterdir()} == arms
    found = json.loads((place.root / "serving.json").read_text(encoding="utf-8"))
    assert set(found["ms_per_token"]) == {"base", "particles.lora.s0", "manual.lora.s0"}
    assert all(0 < ms < 1000 for ms in found["ms_per_token"].values())
    assert found["refused"] == {}
    row = find(study, runner.results(place), found).of("manual", "lora")
    assert row is not None
    assert row.serving_ms == found["ms_per_token"]["manual.lora.s0"]


def test_nothing_is_served_where_nothing_was_kept(tmp_path: Path) -> None:
    study = small(tmp_path)
    with pytest.raises(TrainingError, match="no adapter is kept there"):
        serving.measure(study, Place(tmp_path / "empty"))
    asked = [str(tmp_path / "study.yaml"), "--out", str(tmp_path), "--serving-only", "--arms", "0"]
    done = CliRunner().invoke(cli.app, asked)
    assert (done.exit_code, "runs no arms" in done.output) == (2, True)


@pytest.mark.slow
def test_each_arm_has_a_process_and_a_broken_one_is_named(tmp_path: Path) -> None:
    study, place = small(tmp_path), Place(tmp_path / "out")
    runner.prepare(study, place)
    heard: list[Arm] = []
    assert runner.run(study, place, lambda arm, done, known: heard.append(arm), limit=1) == 1
    assert [arm.id for arm in heard] == list(runner.results(place)) == ["particles.few_shot"]
    (place.material("manual") / "test.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(TrainingError, match=r"arm manual\.few_shot broke"):
        runner.run(study, place)
    assert list(runner.results(place)) == ["particles.few_shot"]
