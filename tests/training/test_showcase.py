from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from base.load import Base
from training import checkpoint, showcase
from training.config import OptimConfig
from training.methods.files import CONFIG
from training.tasks import TASKS


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(showcase, "TEST_ITEMS", 6)
    monkeypatch.setattr(showcase, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(showcase, "SHOTS", 2)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("sample", showcase.SHIPPED, ids=lambda sample: sample.name)
def test_a_sample_is_trained_measured_and_described(
    base: Base, tmp_path: Path, sample: showcase.Sample
) -> None:
    sample = replace(sample, optim=OptimConfig(steps=2, batch_size=2), train_items=8)
    heard: list[tuple[str, int]] = []
    arms = showcase.make_sample(
        base, sample, tmp_path, lambda step: None, lambda arm, done: heard.append((arm, done))
    )
    assert {arm.score.total for arm in arms} == {6}
    assert {arm for arm, _ in heard} == {arm.name for arm in arms}
    config = checkpoint.low_rank_config(json.loads((tmp_path / CONFIG).read_text()))
    assert config is not None
    assert config.kind == sample.method.kind
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["arm"] for row in evaluation["exact_match"]] == [arm.name for arm in arms]
    assert evaluation["base"]["fingerprint"] == base.spec.fingerprint
    assert (tmp_path / "README.md").read_text() == showcase.card(evaluation)


def test_a_few_shot_prompt_shows_training_items_before_the_question(base: Base) -> None:
    shown = showcase.shots(TASKS["cipher"])
    assert len(shown) == showcase.SHOTS
    assert {item.split for item in shown} == {"train"}
