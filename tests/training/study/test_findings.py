from __future__ import annotations

import json
from typing import Any

import pytest

from training.study.cli import as_json
from training.study.config import StudyConfig
from training.study.findings import Findings, find
from training.study.markdown import markdown
from training.study.page import page
from training.study.words import verdict_line

ITEMS = 100


def study(**fields: Any) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "Two | tasks",
            "tasks": [
                {"name": "facts", "metric": "exact_match"},
                {"name": "manual", "metric": "nats"},
            ],
            "methods": [
                {"method": {"kind": "lora"}, "learning_rates": [1e-3]},
                {"method": {"kind": "ia3"}, "learning_rates": [1e-2]},
            ],
            "references": ["few_shot"],
            "hypothesis": {"method": "lora", "over": "few_shot", "at_least": 2},
            "seeds": [0, 1],
            "tokens": 1000,
            **fields,
        }
    )


def scores(right: int, nats: float) -> dict[str, Any]:
    return {
        "right": [1] * right + [0] * (ITEMS - right),
        "nats": [nats * 10] * ITEMS,
        "tokens": [10] * ITEMS,
    }


def arm(kind: str, task: str, name: str, rate: float, seed: int, **found: Any) -> dict[str, Any]:
    return {
        "arm": {"kind": kind, "task": task, "name": name, "learning_rate": rate, "seed": seed},
        "peak_bytes": 2**20,
        **found,
    }


def results(lora: tuple[int, float], few_shot: tuple[int, float]) -> dict[str, dict[str, Any]]:
    """Both tasks: the reference, and lora with two seeds; (right answers, nats for each token)."""
    found = {}
    trained = {
        "validation_nats": 1.0,
        "parameters": 10,
        "file_bytes": 2048,
        "tokens": 1000,
        "train_seconds": 2.0,
        "tokens_per_second": 500.0,
        "curve": [[500, 2.0], [1000, 1.0]],
        "retention": [1, 1, 0, 1],
    }
    for task in ("facts", "manual"):
        found[f"{task}.few_shot"] = arm(
            "reference", task, "few_shot", 0.0, 0, test=scores(*few_shot), retention=None
        )
        found[f"{task}.lora.lr0.001.s0"] = arm("trial", task, "lora", 1e-3, 0, **trained)
        for seed in (0, 1):
            found[f"{task}.lora.s{seed}"] = arm(
                "final", task, "lora", 1e-3, seed, test=scores(*lora), **trained
            )
    for name, result in found.items():
        result["arm"]["id"] = name
    return found


def found(lora: tuple[int, float], few_shot: tuple[int, float], **fields: Any) -> Findings:
    return find(study(**fields), results(lora, few_shot))


def test_better_on_both_tasks_holds_and_fewer_nats_are_better() -> None:
    verdict = found((80, 1.0), (20, 2.0)).verdict
    assert verdict is not None
    assert verdict.won == {"facts": True, "manual": True}
    assert verdict.holds is True


def test_a_bound_that_does_not_reach_is_no_win() -> None:
    """56 of 100 against 50: above, but not by its interval."""
    verdict = found((56, 2.0), (50, 1.0)).verdict
    assert verdict is not None
    assert verdict.won == {"facts": False, "manual": False}
    assert verdict.holds is False


def test_what_has_not_run_leaves_the_verdict_open_while_it_matters() -> None:
    some = results((80, 1.0), (20, 2.0))
    del some["manual.lora.s1"]
    verdict = find(study(), some).verdict
    assert verdict is not None
    assert verdict.won == {"facts": True, "manual": None}
    assert verdict.holds is None
    assert "not run to the end: manual" in verdict_line(find(study(), some))
    one = study(hypothesis={"method": "lora", "over": "few_shot", "at_least": 1})
    decided = find(one, some).verdict
    assert decided is not None
    assert decided.holds is True


def test_comparisons_are_of_the_same_items() -> None:
    findings = found((80, 1.0), (20, 2.0))
    by_task = {c.task: c.paired for c in findings.comparisons}
    assert by_task["facts"].difference.value == pytest.approx(0.6)
    assert by_task["facts"].p < 0.01
    assert by_task["manual"].difference.value == pytest.approx(-1.0)
    same = {c.task: c.paired for c in found((20, 2.0), (20, 2.0)).comparisons}
    assert same["facts"].p == 1.0


def test_all_right_is_not_certain() -> None:
    row = found((ITEMS, 1.0), (0, 2.0)).of("facts", "lora")
    assert row is not None
    assert (row.quality.value, row.quality.high) == (1.0, 1.0)
    assert 0.95 < row.quality.low < 0.98  # Wilson's


@pytest.mark.parametrize(("right", "passed"), [(3, True), (60, False)])
def test_shuffled_labels_that_teach_something_fail_the_control(right: int, passed: bool) -> None:
    some = results((80, 1.0), (20, 2.0))
    some["facts.lora.shuffled_labels.s0"] = arm(
        "shuffled_labels", "facts", "lora", 1e-3, 0, test=scores(right, 1.0), chance=0.05
    )
    some["facts.lora.shuffled_labels.s0"]["arm"]["id"] = "facts.lora.shuffled_labels.s0"
    (control,) = find(study(), some).controls
    assert control.passed is passed
    some["facts.lora.shuffled_labels.s0"]["chance"] = 0.95  # over what lora itself reaches
    verdict = find(study(), some).verdict
    assert verdict is not None
    assert verdict.at_chance == ("facts",)
    assert "On facts the bound is not above chance" in verdict_line(find(study(), some))
    some["facts.lora.shuffled_labels.s0"]["chance"] = 0.05
    assert ("**failed**" in markdown(find(study(), some), "")) is not passed


def test_reports_say_the_same_and_what_is_missing() -> None:
    findings = found((80, 1.0), (20, 2.0))
    text, html = markdown(findings, "made by hand"), page(findings, "made by hand")
    assert "| lora | 80.0% |" in text
    assert "Not complete" in text
    for said in ("made by hand", "It holds: 2 of 2", "80.0%", "few-shot", "Two | tasks"):
        assert said in html
    assert json.loads(json.dumps(as_json(findings, "")))["verdict"]["holds"] is True
