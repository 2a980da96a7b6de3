"""What a client may order: settings by name, and nothing that could be a path, a base or code."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import InvalidRequest
from service.jobs.files import TrainingFile
from service.jobs.order import (
    Order,
    TemplateStamp,
    allowed,
    method_kind,
    named,
    refusal,
    run_config,
    settled,
)
from tests.service.jobs.conftest import order_of

FILE = TrainingFile("file-" + "0" * 24, "data.jsonl", "fine-tune", ".jsonl", 3, "0" * 64, 0.0)


def test_settings_of_the_schema_pass() -> None:
    given = {
        "optim": {"steps": 10, "learning_rate": 1e-3},
        "method": {"rank": 4, "targets": ["q_proj", "all-linear"], "init_text": "a/b: any text"},
        "data": {"max_length": 64, "packing": True, "columns": {"prompt": "My question?"}},
        "budget": {"minutes": 1.5},
        "checkpoint_every": 5,
    }
    assert allowed(given) == given


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"base": "/etc"}, "base"),
        ({"out": "../../x"}, "out"),
        ({"publish": {"url": "http://elsewhere"}}, "publish"),
        ({"data": {"train": "/etc/passwd"}}, "data.train"),
        ({"data": {"template": "x.jinja"}}, "data.template"),
        ({"method": {"kind": "full"}}, "method.kind"),
        ({"method": {"from": "/etc/passwd"}}, "method.from"),
        ({"method": {"from": "../up"}}, "method.from"),
        ({"method": {"targets": ["a", "../up"]}}, "method.targets"),
        ({"method": {"a b": 1}}, "method.a b"),
        ({"optim": {"steps": 10**7}}, "optim.steps"),
        ({"optim": {"learning_rate": float("inf")}}, "optim.learning_rate"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate"),
        ({"optim": 3}, "optim"),
        ({"optim": {"x": [0] * 65}}, "optim.x"),
        ({"method": {"init_text": "x" * 2001}}, "method.init_text"),
        ({"seed": 3}, "seed"),
    ],
)
def test_others_are_refused_by_name(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        allowed(given)
    assert refused.value.field == f"config.{field}"


def test_methods() -> None:
    assert (method_kind("supervised"), method_kind("dora")) == ("lora", "dora")
    for wrong in ("dpo", "reinforcement", "full", "../x", ""):
        with pytest.raises(InvalidRequest, match="not trained here"):
            method_kind(wrong)


def test_a_config_names_files_of_its_own_directory_only() -> None:
    found = run_config(order_of(FILE, config={"data": {"max_length": 8}}, seed=7), "/a/base")
    assert found["data"] == {"max_length": 8, "train": "training_file.jsonl", "eval": None}
    assert (found["base"], found["out"], found["seed"]) == ("/a/base", "adapter", 7)
    assert found["double_quant"] is None, "as the base says, and the server asks it too"
    assert run_config(order_of(FILE), "/a/base", True)["double_quant"], "as the server quantises"


@pytest.mark.parametrize(
    ("packing", "steps"),
    [(False, 8), (True, 3)],  # 3 epochs of 10 in 4s; of 80 tokens in 4 x 32
)
def test_epochs_become_steps(packing: bool, steps: int) -> None:
    config = {
        "optim": {"steps": 300, "batch_size": 4, "learning_rate": 0.1},
        "data": {"packing": packing, "max_length": 32},
    }
    found = settled(order_of(FILE, epochs=3, rate_multiplier=0.5), config, 10, 100)
    assert found["optim"] == {"steps": steps, "batch_size": 4, "learning_rate": 0.05}
    assert settled(order_of(FILE), config, 10, 100) == config


def test_messages_name_files_by_their_ids() -> None:
    told = named(order_of(FILE), "training_file.jsonl:3: prompt: a text is needed")
    assert told == f"training_file {FILE.id}:3: prompt: a text is needed"


@pytest.mark.parametrize(
    ("field", "message", "told", "param"),
    [
        ("method.kind", "method.kind: one of lora", "method.type: one of lora", "method.type"),
        (
            "optim.epochs",
            "optim.steps and optim.epochs: one of them",
            "optim.steps and n_epochs: one of them",
            "n_epochs",
        ),
        ("seed", "seed: at most 9 (got 'seed')", "seed: at most 9 (got 'seed')", "seed"),
        ("base", "base: the base is none", "model: the base is none", "model"),
        (
            "eval.every",
            "eval.every needs data.eval, or data.split",
            "eval.every needs validation_file, or data.split",
            "config.eval.every",
        ),
        (
            "data.columns",
            "data.columns: data.evals is none\ndata.train: is needed",
            "data.columns: data.evals is none\ntraining_file: is needed",
            "config.data.columns",
        ),
        (None, "training_file.jsonl: bad", f"training_file {FILE.id}: bad", "training_file"),
    ],
)
def test_a_refusal_names_what_the_client_can_set(
    field: str | None, message: str, told: str, param: str
) -> None:
    assert refusal(order_of(FILE), {"field": field, "message": message}) == (told, param)


def test_a_template_is_kept_as_it_was_and_never_named_by_its_path() -> None:
    stamp = TemplateStamp("asking", 2, "0" * 64, "user: '{{ input }}'")
    order = order_of(FILE, template=stamp)
    assert Order.from_json(order.to_json()) == order
    assert run_config(order, "/base")["data"]["template"] == "template.yaml"
    assert "template" not in run_config(order_of(FILE), "/base")["data"]
    assert named(order, "template.yaml: user: line 1") == "template asking@2: user: line 1"
