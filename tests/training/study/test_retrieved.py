"""The arms dense and hybrid: what a server finds is asked as the server itself would ask it."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.load import Base, load_base
from base.mini import MINI
from training.study.config import StudyConfig
from training.study.material import Material
from training.study.place import Place
from training.study.prompts import Prompts
from training.study.questions import Questions, body_of, query_of
from training.study.requests import cost_of_requests
from training.study.retrieved import collection_name, found_by, post, search
from training.study.runner import prepare
from training.study.server import server

TEMPLATE = """
name: short
system: Answer with one word.
user: "{{ input }} Say it."
"""


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(MINI, dtype="float32")


def study_in(folder: Path) -> StudyConfig:
    (folder / "short.yaml").write_text(TEMPLATE, encoding="utf-8")
    return StudyConfig.model_validate(
        {
            "name": "ways",
            "tasks": [
                {"name": "facts", "metric": "exact_match", "train_items": 20, "test_items": 5,
                 "validation_items": 2, "passages": 2, "template": folder / "short.yaml"},
            ],
            "references": ["zero_shot", "template", "dense", "hybrid"],
            "methods": [{"method": {"kind": "lora", "rank": 2}, "learning_rates": [1e-3]}],
            "tokens": 100,
        }
    )  # fmt: skip


def test_the_template_stands_around_the_question(base: Base, tmp_path: Path) -> None:
    study = study_in(tmp_path)
    prepare(study, (place := place_of(tmp_path)))
    material = Material.read(place.material("facts"))
    item = material.test[0]
    found = Prompts(base, study.tasks[0], material, "template").example(item)
    text = base.tokenizer.decode(found.tokens[: found.answer_start])
    assert f"{item.question} Say it.<|im_end|>" in text
    assert "Answer with one word." in text
    plain = Prompts(base, study.tasks[0], material).example(item)
    said = slice(plain.answer_start, None)
    assert found.tokens[found.answer_start :] == plain.tokens[said]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"template": None}, "needs a `template`"),
        ({"metric": "nats", "name": "manual"}, "a document is not asked"),
    ],
)
def test_a_template_is_needed_and_asks_a_question(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    values = study_in(tmp_path).model_dump(mode="json")
    values["tasks"][0] |= change
    with pytest.raises(ValueError, match=says):
        StudyConfig.model_validate(values)


def place_of(folder: Path) -> Place:
    return Place(folder / "out")


@pytest.mark.slow
def test_what_an_arm_reads_is_what_the_server_generates_from(base: Base, tmp_path: Path) -> None:
    """Token for token, in each way; and each way has its costs."""
    study, place = study_in(tmp_path), place_of(tmp_path)
    prepare(study, place)
    search(study, place)
    task = study.tasks[0]
    folder = place.material("facts")
    material = Material.read(folder)
    with server(study) as running:
        costs = cost_of_requests(running, study, place, [])
        assert costs.keys() == {f"facts.{name}" for name in study.references}
        for name, cost in costs.items():
            assert cost["ms"] > 0
            prepared = {"facts.zero_shot": 0, "facts.template": len(TEMPLATE)}
            assert cost["prepared_bytes"] == prepared.get(name, cost["prepared_bytes"])
        assert costs["facts.dense"]["prepared_bytes"] > 1000
        for reference in study.references:
            found = found_by(reference, folder)
            prompts = Prompts(base, task, material, reference, found)
            asked = Questions(task, material, reference, found)
            for item in material.test:
                name = f"study-{collection_name(task)}"
                body = body_of(reference, item, asked, 2, collection_name(task), name)
                body["parameters"] = {"max_new_tokens": 1, "decoder_input_details": True}
                said = post(running.client, "/generate", body)["details"]["prefill"]
                example = prompts.example(item)
                assert [t["id"] for t in said] == list(example.tokens[: example.answer_start])
                if found is not None:
                    assert len(found[query_of(item)]) == 2
