"""The adapters of the study that ship: the best of each task, and they answer as was recorded."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from adapters.limits import Limits
from adapters.validate import validate
from base.load import Base, load_base
from base.mini import MINI
from training import checkpoint
from training.evaluation.likelihood import likelihoods
from training.methods.files import CONFIG, WEIGHTS
from training.study.best import best_arms
from training.study.config import StudyConfig, read_study
from training.study.material import make_material
from training.study.prompts import Prompts

DOCS = Path(__file__).resolve().parents[3] / "docs" / "study"
ITEMS = 8
TASKS = ("cipher", "records", "facts", "manual", "particles")


@pytest.fixture(scope="module")
def study() -> StudyConfig:
    return read_study(DOCS / "study.yaml")


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, Any]]:
    """The result of each arm by its id."""
    found = {}
    with tarfile.open(DOCS / "arms.tar.gz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.startswith("arms/") else None
            if file is not None:
                result = json.load(file)
                found[str(result["arm"]["id"])] = result
    return found


@pytest.fixture(scope="module")
def mini() -> Base:
    return load_base(MINI, device="cpu", dtype="float32")


@pytest.mark.parametrize("task", TASKS)
def test_the_best_arm_of_each_task_ships_and_answers_as_recorded(
    mini: Base, study: StudyConfig, recorded: dict[str, dict[str, Any]], task: str
) -> None:
    where, best = DOCS / "adapters" / task, best_arms(study, recorded)[task]
    (told,) = json.loads((where / "evaluation.json").read_text())["evaluations"]
    assert told["arm"] == best["arm"]["id"]
    with safe_open(where / WEIGHTS, "pt") as file:
        assert file.metadata()["base_fingerprint"] == mini.spec.fingerprint
    validate((where / CONFIG).read_bytes(), where / WEIGHTS, mini.spec, Limits())
    config = study.task(task)
    material = make_material(config)
    prompts = Prompts(mini, config, material)
    asked = [prompts.example(item) for item in material.test[:ITEMS]]
    adapter = checkpoint.load(where, mini)
    found = [one.nats for one in likelihoods(mini, asked, adapter=adapter)]
    adapter.detach()
    assert found == pytest.approx(best["test"]["nats"][:ITEMS], rel=1e-3, abs=1e-3)
