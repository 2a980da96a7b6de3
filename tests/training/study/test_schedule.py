from __future__ import annotations

from typing import Any

import pytest

from training.errors import ConfigError
from training.study.arm import Arm
from training.study.config import StudyConfig, read_study
from training.study.schedule import arms, chosen_rate, next_arm


def study(**fields: Any) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "two tasks",
            "tasks": [
                {"name": "cipher", "metric": "exact_match"},
                {"name": "manual", "metric": "nats"},
            ],
            "methods": [
                {"method": {"kind": "lora"}, "learning_rates": [1e-3, 1e-2]},
                {"method": {"kind": "ia3"}, "learning_rates": [1e-2, 1e-1]},
            ],
            "references": ["zero_shot"],
            "controls": ["shuffled_labels"],
            "seeds": [0, 1],
            "tokens": 1000,
            **fields,
        }
    )


def run_all(of: StudyConfig, until: int = 10_000) -> tuple[list[Arm], dict[str, dict[str, Any]]]:
    """Every arm ends at once; the smaller rate has the better validation loss on `cipher` alone."""
    order: list[Arm] = []
    results: dict[str, dict[str, Any]] = {}
    while (arm := next_arm(of, results)) is not None and len(order) < until:
        order.append(arm)
        loss = arm.learning_rate if arm.task == "cipher" else -arm.learning_rate
        results[arm.id] = {"validation_nats": loss}
    return order, results


def test_each_method_gets_the_same_arms_once_each() -> None:
    order, _ = run_all(study())
    assert len({arm.id for arm in order}) == len(order)
    for method in ("lora", "ia3"):
        for task in ("cipher", "manual"):
            mine = [arm for arm in order if (arm.task, arm.name) == (task, method)]
            assert [arm.kind for arm in mine].count("trial") == 2
            assert [arm.seed for arm in mine if arm.kind == "final"] == [0, 1]
    controls = [arm for arm in order if arm.kind == "shuffled_labels"]
    assert [arm.name for arm in controls] == ["lora", "lora"]


def test_the_rate_is_chosen_by_validation_task_by_task() -> None:
    of = study()
    order, results = run_all(of)
    rates = {arm.task: arm.learning_rate for arm in order if arm.kind == "final"}
    assert rates == {"cipher": 1e-2, "manual": 1e-1}  # of the last method
    assert chosen_rate(of, of.methods[0], of.tasks[0], results) == 1e-3
    assert chosen_rate(of, of.methods[0], of.tasks[1], results) == 1e-2


def test_no_rate_is_chosen_before_every_trial_has_ended() -> None:
    of = study()
    assert chosen_rate(of, of.methods[0], of.tasks[0], {"cipher.lora.lr0.001.s0": {}}) is None
    nan = {
        f"cipher.lora.lr{r:g}.s0": {"validation_nats": v}
        for r, v in [(1e-3, 2.0), (1e-2, float("nan"))]
    }
    assert chosen_rate(of, of.methods[0], of.tasks[0], nan) == 1e-3


def test_a_stopped_study_goes_on_where_it_was() -> None:
    whole, _ = run_all(study())
    for until in (1, 4, 9):
        first, results = run_all(study(), until)
        rest = []
        while (arm := next_arm(study(), results)) is not None:
            rest.append(arm)
            results[arm.id] = {
                "validation_nats": arm.learning_rate * (1 if arm.task == "cipher" else -1)
            }
        assert [*first, *rest] == whole


def test_a_method_that_is_refused_does_not_stop_the_study() -> None:
    of = study()
    results: dict[str, dict[str, Any]] = {}
    while (arm := next_arm(of, results)) is not None:
        results[arm.id] = {"refused": "no"} if arm.name == "ia3" else {"validation_nats": 1.0}
    assert not any(arm.kind == "final" and arm.name == "ia3" for arm in arms(of, results))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {
                "methods": [
                    {"method": {"kind": "lora"}, "learning_rates": [1e-3]},
                    {"method": {"kind": "ia3"}, "learning_rates": [1e-2, 1e-1]},
                ]
            },
            "as many learning rates",
        ),
        ({"tasks": [{"name": "chess", "metric": "accuracy"}]}, "task 'chess': one of cipher"),
        (
            {"hypothesis": {"method": "dora", "over": "zero_shot", "at_least": 1}},
            "'dora' is none of",
        ),
        (
            {"hypothesis": {"method": "lora", "over": "zero_shot", "at_least": 3}},
            "there are 2 tasks",
        ),
        ({"seeds": [1, 1]}, "one is there twice"),
    ],
)
def test_an_unfair_or_impossible_study_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        study(**fields)


def test_a_study_file_that_cannot_be_read_is_named(tmp_path: Any) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a list"):
        read_study(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_study(tmp_path / "none.yaml")
