"""Which arm is next: a function of the study and of what is on the disk, so a study resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from training.study.arm import Arm
from training.study.config import ArmConfig, Reference, StudyConfig, TaskConfig

Results = Mapping[str, Mapping[str, Any]]  # by the arm's id


def next_arm(study: StudyConfig, results: Results) -> Arm | None:
    """The first arm, in the order of importance, whose result is missing."""
    return next((arm for arm in arms(study, results) if arm.id not in results), None)


def arms(study: StudyConfig, results: Results) -> Iterator[Arm]:
    """All arms that can be named now, in order.

    What the hypothesis needs comes first, so that a study that is stopped early has still asked it:
    its reference and the first method. Then the other references, the controls, which are about
    the first method, and the methods in the study's order. A method's final arms are named once
    its trials have chosen a rate.
    """
    said = study.hypothesis
    first = [name for name in study.references if said and name == said.over]
    yield from _references(study, first)
    yield from _of_method(study, study.methods[0], results)
    yield from _references(study, [name for name in study.references if name not in first])
    yield from _controls(study, study.methods[0], results)
    for method in study.methods[1:]:
        yield from _of_method(study, method, results)


def _references(study: StudyConfig, names: Sequence[Reference]) -> Iterator[Arm]:
    for name in names:
        for task in study.tasks:
            yield Arm("reference", task.name, name)


def _of_method(study: StudyConfig, method: ArmConfig, results: Results) -> Iterator[Arm]:
    for task in study.tasks:
        yield from trials(study, method, task)
        rate = chosen_rate(study, method, task, results)
        if rate is not None:
            for seed in study.seeds:
                yield Arm("final", task.name, method.label, rate, seed)


def _controls(study: StudyConfig, method: ArmConfig, results: Results) -> Iterator[Arm]:
    for control in study.controls:
        for task in study.tasks:
            rate = chosen_rate(study, method, task, results)
            if rate is not None and (control != "other_task" or len(study.tasks) > 1):
                yield Arm(control, task.name, method.label, rate, study.seeds[0])


def trials(study: StudyConfig, method: ArmConfig, task: TaskConfig) -> list[Arm]:
    """One for each learning rate, all with the first seed."""
    rates = method.learning_rates
    return [Arm("trial", task.name, method.label, rate, study.seeds[0]) for rate in rates]


def chosen_rate(
    study: StudyConfig, method: ArmConfig, task: TaskConfig, results: Results
) -> float | None:
    """The rate with the smallest validation loss, once every trial has ended; None until then,
    and where each was refused."""
    found = {arm.learning_rate: results.get(arm.id) for arm in trials(study, method, task)}
    if any(result is None for result in found.values()):
        return None
    losses = {
        rate: result["validation_nats"]
        for rate, result in found.items()
        if result is not None and result.get("validation_nats") is not None
    }
    finite = {rate: loss for rate, loss in losses.items() if loss == loss}
    return min(finite, key=lambda rate: finite[rate]) if finite else None
