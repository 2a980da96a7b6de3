"""The checks of virtual tokens: what cannot be meant, and what cannot fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.validate import validate
from base.spec import BaseSpec
from tests.adapters.conftest import Saver
from tests.oracle import VIRTUAL_KINDS

TABLE = {"modules_to_save": ["embed_tokens"]}
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    *((kind, {}, {"num_virtual_tokens": None}, "num_virtual_tokens") for kind in VIRTUAL_KINDS),
    *((kind, {}, {"num_virtual_tokens": 0}, "num_virtual_tokens") for kind in VIRTUAL_KINDS),
    *((kind, {}, {"num_transformer_submodules": 2}, "num_transformer_submodules")
      for kind in VIRTUAL_KINDS),
    *((kind, {}, {"num_layers": 3}, "num_layers") for kind in VIRTUAL_KINDS),
    *((kind, {}, {"token_dim": 48}, "token_dim") for kind in VIRTUAL_KINDS),
    *((kind, {}, {"target_modules": ["q_proj"]}, "target_modules") for kind in VIRTUAL_KINDS),
    *((kind, TABLE, {}, "modules_to_save")
      for kind in VIRTUAL_KINDS if kind not in ("prefix_tuning", "cartridge")),
    ("prompt_tuning", {}, {"num_virtual_tokens": 5}, "prompt_embeddings"),
    ("prompt_tuning", {}, {"modules_to_save": ["nowhere"]}, "modules_to_save"),
    ("prefix_tuning", {}, {"num_attention_heads": 2}, "num_attention_heads"),
    ("cartridge", {}, {"num_frozen_tokens": 5}, "num_frozen_tokens"),
    ("cartridge", {}, {"num_frozen_tokens": -1}, "num_frozen_tokens"),
    ("cpt", {}, {"cpt_token_ids": [7, 8, 9]}, "num_virtual_tokens"),
    ("cpt", {}, {"cpt_token_ids": "7 8 9 10"}, "cpt_token_ids"),
    ("multitask_prompt_tuning", {}, {"num_tasks": 2}, "num_tasks"),
    ("multitask_prompt_tuning", {}, {"num_ranks": 2}, "prefix_task_cols"),
    ("multitask_prompt_tuning", {}, {"num_ranks": None}, "num_ranks"),
    # A prefix of another method has tensors that this one does not know.
    ("multitask_prompt_tuning", {}, {"peft_type": "PROMPT_TUNING"}, "num_ranks"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "fields", "where"), REFUSED)
def test_what_cannot_be_honoured_is_named(
    kind: str,
    options: dict[str, Any],
    fields: dict[str, Any],
    where: str,
    save: Saver,
    spec: BaseSpec,
) -> None:
    saved = save(kind, **options)
    with pytest.raises(InvalidAdapter) as caught:
        validate(saved.with_fields(**fields), saved.weights, spec, Limits())
    assert caught.value.where == where


@pytest.mark.parametrize("kind", VIRTUAL_KINDS)
def test_a_prefix_leaves_room_for_a_prompt_and_an_answer(
    kind: str, save: Saver, spec: BaseSpec
) -> None:
    saved = save(kind, rank=4)
    fits = replace(spec, max_positions=6)
    assert validate(saved.config, saved.weights, fits, Limits()).config["num_virtual_tokens"] == 4
    with pytest.raises(InvalidAdapter, match=r"4 virtual tokens, .* base is 5: at most 3") as found:
        validate(saved.config, saved.weights, replace(spec, max_positions=5), Limits())
    assert found.value.where == "num_virtual_tokens"


def test_how_it_was_made_does_not_change_what_it_is(save: Saver, spec: BaseSpec) -> None:
    """The file holds what an encoder gave: its fields are not part of the adapter's identity."""
    saved = save("p_tuning", encoder_hidden_size=16)
    other = saved.with_fields(encoder_hidden_size=99, encoder_reparameterization_type="LSTM")
    one, two = (validate(c, saved.weights, spec, Limits()) for c in (saved.config, other))
    assert one.config == two.config


def test_no_file_that_a_config_names_is_opened(save: Saver, spec: BaseSpec) -> None:
    saved = save("multitask_prompt_tuning")
    config = saved.with_fields(
        prompt_tuning_init="EXACT_SOURCE_TASK", prompt_tuning_init_state_dict_path="/nowhere.pt"
    )
    validate(config, saved.weights, spec, Limits())
