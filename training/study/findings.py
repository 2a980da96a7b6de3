"""What the results come to: a figure with its interval for each arm, tests, controls, the verdict.

Everything here is a function of the study and the result files, so a report can be made again, and
of a study that has not ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from adapters.intervals import rate
from training.evaluation.significance import (
    Estimate,
    Paired,
    bootstrap,
    mcnemar,
    paired_bootstrap,
    ratio,
)
from training.study.config import Metric, StudyConfig, TaskConfig
from training.study.schedule import Results, arms, chosen_rate, trials

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One arm of one task: a reference, or a method at its chosen rate over its seeds."""

    task: str
    name: str
    trained: bool
    quality: Estimate  # a part of 1, or nats for each token
    seeds: int
    items: int
    learning_rate: float | None = None
    parameters: int | None = None
    file_bytes: int | None = None
    peak_bytes: int | None = None  # the largest of the seeds
    tokens: int | None = None  # mean of the seeds, as all below
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    retention: Estimate | None = None
    serving_ms: float | None = None  # for each token
    request: Mapping[str, Any] | None = None  # what one costs, by `requests`
    curves: tuple[tuple[tuple[float, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method against a reference on the same items, the seeds' mean of each item."""

    task: str
    method: str
    over: str
    paired: Paired


@dataclass(frozen=True, slots=True)
class Control:
    """What could have proved the study wrong, and whether it did."""

    name: str
    task: str
    expected: str
    found: str
    passed: bool | None  # None: nothing was claimed


@dataclass(frozen=True, slots=True)
class Verdict:
    """The hypothesis as it was written down, task by task."""

    method: str
    over: str
    needed: int
    won: Mapping[str, bool | None]  # None: not run
    at_chance: tuple[str, ...] = ()  # where the method's lower bound is not above chance

    @property
    def holds(self) -> bool | None:
        """None while the tasks that are missing could still decide it."""
        wins = sum(bool(won) for won in self.won.values())
        open_tasks = sum(won is None for won in self.won.values())
        if wins >= self.needed:
            return True
        return None if wins + open_tasks >= self.needed else False


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a report says."""

    study: StudyConfig
    rows: tuple[Row, ...]
    trials: Mapping[tuple[str, str], Mapping[float, float | str]]  # rate -> validation nats, or why
    comparisons: tuple[Comparison, ...]
    controls: tuple[Control, ...]
    transfer: Mapping[tuple[str, str], float]  # (adapter's task, asked task) -> quality
    verdict: Verdict | None
    refused: Mapping[str, str]  # arm's id -> why
    missing: tuple[str, ...]  # arms that are known and have not run
    serving: Mapping[str, Any] = field(default_factory=dict)

    def of(self, task: str, name: str) -> Row | None:
        return next((row for row in self.rows if (row.task, row.name) == (task, name)), None)


def find(
    study: StudyConfig, results: Results, serving: Mapping[str, Any] | None = None
) -> Findings:
    """`serving` is what `training.study.serving` measured."""
    served = dict(serving or {})
    times: Mapping[str, float] = served.get("ms_per_token", {})
    requests: Mapping[str, Any] = served.get("requests", {})
    transfer = _transfer(study, results)
    rows = [
        row
        for task in study.tasks
        for row in (
            *_references(study, task, results, requests),
            *_methods(study, task, results, times, requests),
        )
    ]
    return Findings(
        study=study,
        rows=tuple(rows),
        trials=_trials(study, results),
        comparisons=tuple(_comparisons(study, results)),
        controls=(*_controls(study, results), *_foreign(study, transfer)),
        transfer=transfer,
        verdict=_verdict(study, rows, results),
        refused={name: r["refused"] for name, r in results.items() if "refused" in r},
        missing=tuple(arm.id for arm in arms(study, results) if arm.id not in results),
        serving=served,
    )


def figure(metric: Metric, value: float) -> str:
    """As a report writes it."""
    return f"{value:.3f}" if metric == "nats" else f"{value:.1%}"


def better(metric: Metric, a: float, b: float) -> bool:
    """Is a better than b? Fewer nats are."""
    return a < b if metric == "nats" else a > b


def quality(metric: Metric, runs: Sequence[Result]) -> Estimate:
    """Over seeds and items; a rate of one run by Wilson's interval."""
    if metric == "nats":
        return ratio([run["nats"] for run in runs], [run["tokens"] for run in runs])
    return rate_of([run["right"] for run in runs])


def rate_of(runs: Sequence[Sequence[int]]) -> Estimate:
    """Rights [runs, items]. Where all are right or all wrong a bootstrap would be sure of it, so
    Wilson's interval of the items stands there too."""
    share = sum(map(sum, runs)) / sum(map(len, runs))
    if len(runs) > 1 and 0 < share < 1:
        return bootstrap(runs)
    items = len(runs[0])
    found = rate(share * items, items)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    return Estimate(found.estimate, found.low, found.high)


def _references(
    study: StudyConfig, task: TaskConfig, results: Results, requests: Mapping[str, Any]
) -> list[Row]:
    rows = []
    for name in study.references:
        found = results.get(f"{task.name}.{name}")
        if found is None or "test" not in found:
            continue
        kept = found.get("retention")
        rows.append(
            Row(
                task=task.name,
                name=name,
                trained=False,
                quality=quality(task.metric, [found["test"]]),
                seeds=1,
                items=len(found["test"]["nats"]),
                peak_bytes=found["peak_bytes"],
                retention=rate_of([kept]) if kept else None,
                request=requests.get(f"{task.name}.{name}"),
            )
        )
    return rows


def finals(study: StudyConfig, task: TaskConfig, label: str, results: Results) -> list[Result]:
    """The method's final arms that have run."""
    rate = chosen_rate(study, study.arm(label), task, results)
    ids = [f"{task.name}.{label}.s{seed}" for seed in study.seeds] if rate is not None else []
    return [results[i] for i in ids if "test" in results.get(i, {})]


def _methods(
    study: StudyConfig,
    task: TaskConfig,
    results: Results,
    times: Mapping[str, float],
    requests: Mapping[str, Any],
) -> list[Row]:
    rows = []
    for method in study.methods:
        found = finals(study, task, method.label, results)
        if not found:
            continue
        kept = [run["retention"] for run in found if run.get("retention")]
        served = [times[run["arm"]["id"]] for run in found if run["arm"]["id"] in times]
        rows.append(
            Row(
                task=task.name,
                name=method.label,
                trained=True,
                quality=quality(task.metric, [run["test"] for run in found]),
                seeds=len(found),
                items=len(found[0]["test"]["nats"]),
                learning_rate=found[0]["arm"]["learning_rate"],
                parameters=found[0]["parameters"],
                file_bytes=found[0]["file_bytes"],
                peak_bytes=max(run["peak_bytes"] for run in found),
                tokens=round(_mean(run["tokens"] for run in found)),
                train_seconds=_mean(run["train_seconds"] for run in found),
                tokens_per_second=_mean(run["tokens_per_second"] for run in found),
                retention=rate_of(kept) if kept else None,
                serving_ms=_mean(served) if served else None,
                request=requests.get(found[0]["arm"]["id"]),
                curves=tuple(tuple((p[0], p[1]) for p in run["curve"]) for run in found),
            )
        )
    return rows


def _mean(values: Iterable[float]) -> float:
    return fmean(values)


def _trials(
    study: StudyConfig, results: Results
) -> dict[tuple[str, str], dict[float, float | str]]:
    found: dict[tuple[str, str], dict[float, float | str]] = {}
    for task in study.tasks:
        for method in study.methods:
            for arm in trials(study, method, task):
                result = results.get(arm.id)
                if result is not None:
                    value = result.get("validation_nats", result.get("refused"))
                    found.setdefault((task.name, method.label), {})[arm.learning_rate] = value
    return found


def _comparisons(study: StudyConfig, results: Results) -> list[Comparison]:
    """Every method against every reference, and against the first method."""
    first = study.methods[0].label
    found = []
    for task in study.tasks:
        for method in study.methods:
            mine = finals(study, task, method.label, results)
            others: dict[str, Sequence[Result]] = {
                name: [results[f"{task.name}.{name}"]]
                for name in study.references
                if "test" in results.get(f"{task.name}.{name}", {})
            }
            if method.label != first:
                others[first] = finals(study, task, first, results)
            for over, theirs in others.items():
                if mine and theirs:
                    paired = _paired(task.metric, mine, theirs)
                    found.append(Comparison(task.name, method.label, over, paired))
    return found


def _paired(metric: Metric, mine: Sequence[Result], theirs: Sequence[Result]) -> Paired:
    """McNemar where each has one run of rights and wrongs; else the paired bootstrap of the items'
    means over the seeds."""
    if metric == "nats":
        a, b = _nats(mine), _nats(theirs)
        return paired_bootstrap(a, b)
    if len(mine) == len(theirs) == 1:
        both = [[bool(x) for x in run[0]["test"]["right"]] for run in (mine, theirs)]
        return mcnemar(*both)
    a, b = (np.mean([r["test"]["right"] for r in runs], axis=0).tolist() for runs in (mine, theirs))
    return paired_bootstrap(a, b)


def _nats(runs: Sequence[Result]) -> list[float]:
    """Nats for each token of each item, the mean over the seeds."""
    each = [np.divide(run["test"]["nats"], run["test"]["tokens"]) for run in runs]
    found: list[float] = np.mean(each, axis=0).tolist()
    return found


def _controls(study: StudyConfig, results: Results) -> list[Control]:
    label, seed = study.methods[0].label, study.seeds[0]
    found = []
    for task in study.tasks:
        start = f"{task.name}.{label}"
        shuffled = results.get(f"{start}.shuffled_labels.s{seed}", {})
        if "test" in shuffled:
            found.append(_shuffled(study, task, shuffled, results))
        fresh = results.get(f"{start}.zero_steps.s{seed}", {})
        if "bitwise" in fresh:
            said = "the same bits" if fresh["bitwise"] else "other bits"
            far = fresh["largest_difference"]
            found.append(
                Control(
                    f"zero steps of {label}",
                    task.name,
                    "the base's logits, bit for bit",
                    f"{said} on {fresh['items']} items, largest difference {far:g}",
                    bool(fresh["bitwise"]),
                )
            )
    return found


def _shuffled(study: StudyConfig, task: TaskConfig, result: Result, results: Results) -> Control:
    """At chance: no better than the most frequent answer. Documents: no better than the base."""
    got = quality(task.metric, [result["test"]])
    if task.metric == "nats":
        base = results.get(f"{task.name}.zero_shot", {})
        mine = finals(study, task, study.methods[0].label, results)
        learnt = quality("nats", [run["test"] for run in mine]).value if mine else math.nan
        plain = quality("nats", [base["test"]]).value if "test" in base else math.nan
        return Control(
            "words of each page shuffled",
            task.name,
            f"far from what true pages teach ({learnt:.2f} nats a token; the base {plain:.2f})",
            f"{got.value:.2f} ({got.low:.2f} to {got.high:.2f}) nats a token",
            got.low > learnt if mine else None,
        )
    chance = result["chance"]
    return Control(
        "shuffled labels",
        task.name,
        f"chance: at most {chance:.1%}, the most frequent answer",
        f"{got.value:.1%} ({got.low:.1%} to {got.high:.1%})",
        got.low <= chance,
    )


def _transfer(study: StudyConfig, results: Results) -> dict[tuple[str, str], float]:
    """Adapter i on task j; the diagonal is the adapter on its own task, the same seed."""
    label, seed = study.methods[0].label, study.seeds[0]
    found: dict[tuple[str, str], float] = {}
    for task in study.tasks:
        others = results.get(f"{task.name}.{label}.other_task.s{seed}", {}).get("others")
        own = results.get(f"{task.name}.{label}.s{seed}", {}).get("test")
        if others is None or own is None:
            continue
        for name, scores in {task.name: own, **others}.items():
            found[task.name, name] = quality(study.task(name).metric, [scores]).value
    return found


def _foreign(study: StudyConfig, transfer: Mapping[tuple[str, str], float]) -> list[Control]:
    """The best of the other tasks' adapters must be worse than the task's own."""
    found = []
    for task in study.tasks:
        own = transfer.get((task.name, task.name))
        others = {a: v for (a, asked), v in transfer.items() if asked == task.name != a}
        if own is None or not others:
            continue
        sign = -1 if task.metric == "nats" else 1
        best = max(others, key=lambda name: sign * others[name])
        found.append(
            Control(
                "another task's adapter",
                task.name,
                f"worse than its own ({figure(task.metric, own)})",
                f"{figure(task.metric, others[best])} at best, with that of {best}",
                better(task.metric, own, others[best]),
            )
        )
    return found


def _verdict(study: StudyConfig, rows: Sequence[Row], results: Results) -> Verdict | None:
    said = study.hypothesis
    if said is None:
        return None
    by = {(row.task, row.name): row for row in rows}
    won: dict[str, bool | None] = {}
    at_chance = []
    for task in study.tasks:
        mine, other = by.get((task.name, said.method)), by.get((task.name, said.over))
        if mine is None or other is None or mine.seeds < len(study.seeds):
            won[task.name] = None
        elif task.metric == "nats":
            won[task.name] = mine.quality.high < other.quality.value
        else:
            won[task.name] = mine.quality.low > other.quality.value
            control = f"{task.name}.{study.methods[0].label}.shuffled_labels.s{study.seeds[0]}"
            luck = results.get(control, {}).get("chance")
            if luck is not None and mine.quality.low <= luck:
                at_chance.append(task.name)
    return Verdict(said.method, said.over, said.at_least, won, tuple(at_chance))
