"""Trained tokens: which lists of tokens are taken, and what a refused one is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TrainableTokensConfig
from safetensors.torch import load_file, save_file

from adapters.checks import trainable_tokens
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.validate import validate
from base.spec import BaseSpec
from tests.adapters.conftest import Saved, Saver

TOKENS = [9, 500, 7]
TABLE = "model.embed_tokens"


def saved_rows(save: Saver, tied: bool = False, **options: Any) -> Saved:
    given = {"token_indices": TOKENS, "targets": ["embed_tokens"], **options}
    return save("trainable_tokens", tied, **given)


def refusal(config: bytes, weights: Path, spec: BaseSpec) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        validate(config, weights, spec, Limits())
    return caught.value


def test_every_field_of_peft_s_config_has_a_rule() -> None:
    fields = {field.name for field in dataclasses.fields(TrainableTokensConfig)}
    assert fields <= trainable_tokens.RULES.keys()


@pytest.mark.parametrize(
    ("fields", "where", "reason"),
    [
        ({"twist": 1}, "twist", "unknown field"),
        ({"token_indices": None}, "token_indices", "expected a list"),
        ({"token_indices": []}, "token_indices", "0 tokens, expected a list of 1 to 65536"),
        ({"token_indices": [1.5]}, "token_indices", "1.5, expected token ids"),
        ({"token_indices": [True]}, "token_indices", "True, expected token ids"),
        ({"token_indices": [-1, 5, 6]}, "token_indices", "-1, expected token ids from 0"),
        ({"token_indices": [9, 9, 7]}, "token_indices", "token 9 is there twice"),
        ({"token_indices": [9, 512, 7]}, "token_indices", "token 512 .* has 512 rows"),
        ({"target_modules": ["q_proj"]}, "target_modules", "has no rows for tokens"),
        ({"target_modules": ["norm"]}, "target_modules", "has no rows for tokens"),
        ({"target_modules": ["nothing"]}, "target_modules", "no module of this base"),
        ({"modules_to_save": ["norm"]}, "modules_to_save", "PEFT has none"),
        ({"token_indices": [9]}, f"base_model.model.{TABLE}.trainable_tokens_delta", "for 1 tok"),
        ({"target_modules": ["lm_head"]}, TABLE, "left over: the config does not touch"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(
    fields: dict[str, Any], where: str, reason: str, save: Saver, spec: BaseSpec
) -> None:
    saved = saved_rows(save)
    with pytest.raises(InvalidAdapter, match=reason) as caught:
        validate(saved.with_fields(**fields), saved.weights, spec, Limits())
    assert where in caught.value.where


def test_without_targets_it_is_the_input_table(save: Saver, spec: BaseSpec) -> None:
    saved = saved_rows(save)
    one = validate(saved.config, saved.weights, spec, Limits())
    two = validate(saved.with_fields(target_modules=None), saved.weights, spec, Limits())
    assert one == two
    assert (one.kind, one.rank, one.targets) == ("trainable_tokens", 0, (TABLE,))
    assert one.parameters == 3 * 64


def test_each_tensor_is_needed_and_no_other_taken(
    save: Saver, spec: BaseSpec, tmp_path: Path
) -> None:
    saved = saved_rows(save)
    tensors = load_file(str(saved.weights))
    (name,) = tensors
    for wrong, where, reason in (
        ({f"{name}.more": tensors[name].clone(), **tensors}, f"{name}.more", "left over"),
        ({f"{name}.more": tensors[name]}, f"{name}.more", "left over"),
        ({name: torch.ones(4, 64)}, name, r"shape \[4, 64\], expected \[3, 64\] for 3 tokens"),
        ({name: torch.full((3, 64), float("nan"))}, name, "finite"),
    ):
        save_file(wrong, str(tmp_path / "w"))
        with pytest.raises(InvalidAdapter, match=reason) as caught:
            validate(saved.config, tmp_path / "w", spec, Limits())
        assert caught.value.where == where


def test_a_tied_head_follows_its_table(save: Saver, bases: Any) -> None:
    saved = saved_rows(save, tied=True)
    found = validate(saved.config, saved.weights, bases(True).spec, Limits())
    assert found.targets == ("lm_head", TABLE)
    both = saved.with_fields(target_modules=["embed_tokens", "lm_head"])
    error = refusal(both, saved.weights, bases(True).spec)
    assert "share one tied matrix" in error.reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"trainable_token_indices": {"q_proj": [1]}}, "has no rows for tokens"),
        ({"trainable_token_indices": {"nothing": [1]}}, "no module 'nothing'"),
        ({"trainable_token_indices": {"a b": [1]}}, "not a module name"),
        ({"trainable_token_indices": "5"}, "expected a list"),
        ({"trainable_token_indices": [512]}, "token 512 .* has 512 rows"),
        ({"trainable_token_indices": {"tokens": [1], "embed_tokens": [2]}}, "named twice"),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens", "q_proj"]},
            "is a target or a saved module too",
        ),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "is a target or a saved module too",
        ),
    ],
)
def test_tokens_of_a_lora_that_cannot_be_served(
    fields: dict[str, Any], reason: str, save: Saver, spec: BaseSpec
) -> None:
    saved = save("lora", targets=["q_proj"])
    with pytest.raises(InvalidAdapter, match=reason) as caught:
        validate(saved.with_fields(**fields), saved.weights, spec, Limits())
    assert caught.value.where.startswith("trainable_token_indices")


def test_a_tied_head_cannot_be_adapted_twice(save: Saver, bases: Any) -> None:
    """PEFT puts the rows under a LoRA on the head, and fails on a saved head."""
    saved = save("lora", True, targets=["q_proj"], trainable_token_indices=[1])
    for fields in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        error = refusal(saved.with_fields(**fields), saved.weights, bases(True).spec)
        assert "lm_head has rows of its own for some tokens" in error.reason


def test_tied_modules_with_two_lists(save: Saver, bases: Any) -> None:
    indices = {"embed_tokens": [1], "lm_head": [2]}
    saved = save("lora", True, targets=["q_proj"], trainable_token_indices=indices)
    found = validate(saved.config, saved.weights, bases(True).spec, Limits())
    assert found.config["trainable_token_indices"] == {"lm_head": [2], TABLE: [1]}
    tying = saved.with_fields(ensure_weight_tying=True)
    assert "ensure_weight_tying" in refusal(tying, saved.weights, bases(True).spec).reason


def test_the_order_of_the_tokens_is_part_of_the_identity(save: Saver, spec: BaseSpec) -> None:
    """Row i belongs to token i of the list."""
    saved = saved_rows(save)
    turned = saved.with_fields(token_indices=[7, 500, 9])
    one = validate(saved.config, saved.weights, spec, Limits())
    assert one.config != validate(turned, saved.weights, spec, Limits()).config
