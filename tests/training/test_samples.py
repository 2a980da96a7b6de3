"""The sample adapters that ship: what the card says is true of the files beside it."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from adapters.limits import Limits
from adapters.validate import validate
from base.load import Base, load_base
from base.mini import MINI
from training import checkpoint, showcase
from training.config import MethodConfig
from training.methods.files import CONFIG, WEIGHTS
from training.tasks import TASKS


@pytest.fixture(scope="module")
def mini() -> Base:
    return load_base(MINI, device="cpu", dtype="float32")


@pytest.fixture(params=showcase.SHIPPED, ids=lambda sample: sample.name)
def sample(request: pytest.FixtureRequest) -> showcase.Sample:
    found: showcase.Sample = request.param
    return found


def test_the_card_is_the_one_its_evaluation_gives(sample: showcase.Sample) -> None:
    where = showcase.SAMPLES / sample.name
    evaluation = json.loads((where / "evaluation.json").read_text())
    assert (where / "README.md").read_text() == showcase.card(evaluation)
    assert MethodConfig.model_validate(evaluation["method"]) == sample.method
    assert evaluation["test_items"] == showcase.TEST_ITEMS


def test_it_was_trained_over_the_embedded_base_and_the_store_accepts_it(
    mini: Base, sample: showcase.Sample
) -> None:
    where = showcase.SAMPLES / sample.name
    weights = where / WEIGHTS
    with safe_open(weights, "pt") as file:
        assert file.metadata()["base_fingerprint"] == mini.spec.fingerprint
    found = validate((where / CONFIG).read_bytes(), weights, mini.spec, Limits())
    assert (found.kind, found.rank) == (sample.method.kind, sample.method.rank)
    assert len(found.targets) == 7 * mini.spec.num_layers


def test_held_out_questions_are_answered_with_it_and_not_without(
    mini: Base, sample: showcase.Sample
) -> None:
    items = TASKS[sample.task].items("test", 20)
    before = showcase.measure(mini, "base", items, (), lambda arm, done: None)
    adapter = checkpoint.load(showcase.SAMPLES / sample.name, mini)
    after = showcase.measure(mini, "adapter", items, (), lambda arm, done: None, adapter)
    adapter.detach()
    assert before.score.right == 0
    assert after.score.right >= 17


def test_no_answer_is_cut_short(mini: Base, sample: showcase.Sample) -> None:
    items = TASKS[sample.task].items("test", showcase.TEST_ITEMS)
    longest = max(len(mini.tokenizer.encode(item.answer)) for item in items)
    assert longest < showcase.MAX_NEW_TOKENS
