"""The best adapter of each task, by validation loss, with what the study measured of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from training.evaluation.card import store
from training.methods.files import CONFIG, WEIGHTS
from training.study.config import StudyConfig, TaskConfig
from training.study.findings import Result, quality
from training.study.place import Place
from training.study.schedule import Results

FIGURES = {"exact_match": "exact_match", "accuracy": "accuracy", "nats": "nats_per_token"}


def best_arms(study: StudyConfig, results: Results) -> dict[str, Result]:
    """Task -> the final arm with the smallest validation loss; test items have no say in it."""
    found: dict[str, Result] = {}
    for task in study.tasks:
        finals = [
            result
            for result in results.values()
            if (result["arm"]["kind"], result["arm"]["task"]) == ("final", task.name)
            and "test" in result
        ]
        if finals:
            found[task.name] = min(finals, key=lambda result: result["validation_nats"])
    return found


def keep_best(study: StudyConfig, place: Place, results: Results) -> list[str]:
    """Copy them to out/best/<task>, with an evaluation.json; the tasks that have one."""
    kept = []
    for name, result in best_arms(study, results).items():
        arm = result["arm"]
        folder = place.adapter(name, arm["name"], arm["learning_rate"], arm["seed"])
        if not (folder / WEIGHTS).is_file():
            continue  # full fine-tuning made a base, or the adapters were removed
        out = place.root / "best" / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / file, out / file)
        store(out, _entry(study, study.task(name), result))
        kept.append(name)
    return kept


def _entry(study: StudyConfig, task: TaskConfig, result: Result) -> Mapping[str, Any]:
    figure = quality(task.metric, [result["test"]])
    return {
        "data": f"{study.name}: {task.name}",
        "data_sha256": None,
        "questions": len(result["test"]["nats"]),
        "system": None,
        "figures": {
            FIGURES[task.metric]: {k: round(v, 5) for k, v in asdict(figure).items()},
        },
        "against": {},
        "arm": result["arm"]["id"],
        "trained": {
            key: result[key]
            for key in ("tokens", "steps", "train_seconds", "parameters", "validation_nats")
        },
    }
