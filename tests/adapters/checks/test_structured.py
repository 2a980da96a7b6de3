"""What the checks of rotations, pairs, sparse updates, PEANuT and Poly refuse, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.activations import ACTIVATIONS
from adapters.block_sizes import oft_block_size
from adapters.checks.activation import ACTIVATION_NAMES
from adapters.errors import InvalidAdapter, TooLarge
from adapters.limits import Limits
from adapters.validate import validate
from base.spec import BaseSpec
from tests.adapters.conftest import Saved, Saver

Q0 = "base_model.model.model.layers.0.self_attn.q_proj."
D0 = "base_model.model.model.layers.0.mlp.down_proj."  # the first in a file


def saved_by(save: Saver, kind: str, **options: Any) -> Saved:
    return save(kind, targets=["q_proj", "down_proj"], **options)


# kind, options of the adapter, fields overwritten, the field or tensor that is named
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("oft", {}, {"r": 4}, "oft_block_size"),  # beside a size: which is meant?
    ("oft", {}, {"oft_block_size": 0}, "oft_block_size"),
    ("oft", {}, {"oft_block_size": None}, "oft_block_size"),
    ("oft", {}, {"oft_block_size": 1}, "oft_block_size"),
    ("oft", {}, {"oft_block_size": -8}, "oft_block_size"),
    ("oft", {}, {"oft_block_size": 1 << 40}, "oft_block_size"),
    ("oft", {}, {"r": 64, "oft_block_size": 0}, "r"),
    ("oft", {}, {"oft_block_size": 16}, f"{D0}oft_R.weight"),
    ("oft", {}, {"block_share": True}, f"{D0}oft_R.weight"),
    ("oft", {}, {"block_share": 1}, "block_share"),
    ("oft", {}, {"coft": "yes"}, "coft"),
    ("oft", {}, {"coft": True, "eps": float("1e999")}, "config"),  # no number of JSON
    ("oft", {}, {"coft": True, "eps": None}, "eps"),
    ("oft", {}, {"use_cayley_neumann": None}, "use_cayley_neumann"),
    ("oft", {}, {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms"),
    ("oft", {}, {"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms"),
    ("oft", {}, {"peft_version": "0.17.1"}, "peft_version"),
    ("oft", {}, {"peft_version": None}, "peft_version"),
    ("oft", {}, {"bias": "oft_only"}, "bias"),
    ("oft", {}, {"fan_in_fan_out": True}, "fan_in_fan_out"),
    ("boft", {}, {"boft_block_size": 0}, "boft_block_size"),
    ("boft", {}, {"boft_block_num": 8}, "boft_block_size"),
    ("boft", {}, {"boft_block_size": 24}, "boft_block_size"),
    ("boft", {}, {"boft_block_size": 0, "boft_block_num": 24}, "boft_block_num"),
    ("boft", {}, {"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor"),
    ("boft", {}, {"boft_n_butterfly_factor": 99}, "boft_n_butterfly_factor"),
    (
        "boft",
        {"boft_n_butterfly_factor": 2},
        {"boft_n_butterfly_factor": 6},
        "boft_n_butterfly_factor",
    ),
    ("boft", {"boft_n_butterfly_factor": 2}, {"boft_n_butterfly_factor": 3}, f"{D0}boft_R"),
    ("boft", {}, {"bias": "boft_only"}, "bias"),
    ("road", {}, {"variant": "road_3"}, "variant"),
    ("road", {}, {"variant": None}, "variant"),
    ("road", {}, {"variant": "road_2"}, f"{D0}road_alpha"),
    ("road", {}, {"group_size": 7}, "group_size"),
    ("road", {}, {"group_size": 0}, "group_size"),
    ("road", {}, {"group_size": 48}, "group_size"),
    ("road", {}, {"exclude_modules": ["q_proj"]}, "exclude_modules"),
    ("shira", {}, {"r": 5}, f"{D0}shira_weight"),
    ("shira", {}, {"r": 200}, "r"),
    ("shira", {}, {"r": 300}, "r"),
    ("shira", {}, {"fan_in_fan_out": True}, "fan_in_fan_out"),
    ("peanut", {}, {"depth": -1}, "depth"),
    ("peanut", {}, {"depth": 10**9}, "depth"),
    ("peanut", {}, {"act_fn": "prelu"}, "act_fn"),
    ("peanut", {}, {"act_fn": ["relu"]}, "act_fn"),
    ("peanut", {}, {"scaling": "1"}, "scaling"),
    ("peanut", {}, {"scaling": 1e9}, "scaling"),
    ("peanut", {}, {"r": 300}, "r"),
    ("poly", {}, {"n_tasks": 2}, "n_tasks"),
    ("poly", {}, {"n_tasks": None}, "n_tasks"),
    ("poly", {}, {"poly_type": "other"}, "poly_type"),
    ("poly", {}, {"n_splits": 3}, "n_splits"),
    ("poly", {}, {"n_skills": 0}, "n_skills"),
    ("poly", {}, {"r": 300}, "r"),
]


@pytest.mark.parametrize(("kind", "options", "fields", "where"), REFUSED)
def test_a_field_that_cannot_be_honoured_is_named(
    kind: str,
    options: dict[str, Any],
    fields: dict[str, Any],
    where: str,
    save: Saver,
    spec: BaseSpec,
) -> None:
    saved = saved_by(save, kind, **options)
    with pytest.raises((InvalidAdapter, TooLarge)) as caught:
        validate(saved.with_fields(**fields), saved.weights, spec, Limits())
    assert caught.value.where == where


def test_boft_of_one_factor_whatever_its_config_says(save: Saver, spec: BaseSpec) -> None:
    """PEFT without its CUDA extension trains one, and saves the config as it was."""
    saved = saved_by(save, "boft")
    config = saved.with_fields(boft_n_butterfly_factor=4)
    found = validate(config, saved.weights, spec, Limits()).config
    assert found["boft_n_butterfly_factor"] == 1


def with_indices(saved: Saved, path: Path, change: Any) -> Path:
    tensors = load_file(str(saved.weights))
    name = f"{Q0}shira_indices"
    save_file(tensors | {name: change(tensors[name].clone())}, str(path))
    return path


@pytest.mark.parametrize(
    ("row", "value", "reason"),
    [
        (0, -1, "holds -1 in row 0, expected whole numbers from 0 to 63"),
        (0, 64, "holds 64 in row 0, expected whole numbers from 0 to 63"),
        (1, 1 << 30, "in row 1, expected whole numbers from 0 to 63"),
    ],
)
def test_an_index_outside_of_the_weight_is_refused(
    row: int, value: int, reason: str, save: Saver, spec: BaseSpec, tmp_path: Path
) -> None:
    def change(indices: torch.Tensor) -> torch.Tensor:
        indices[row, -1] = value
        return indices

    saved = saved_by(save, "shira")
    with pytest.raises(InvalidAdapter, match=reason) as caught:
        validate(saved.config, with_indices(saved, tmp_path / "w", change), spec, Limits())
    assert caught.value.where == f"{Q0}shira_indices"


@pytest.mark.parametrize("bad", [0.5, float("nan"), float("inf"), -1.0, 64.0])
def test_indices_as_floats_are_whole_numbers(
    bad: float, save: Saver, spec: BaseSpec, tmp_path: Path
) -> None:
    """As PEFT saves them on Windows."""
    saved = saved_by(save, "shira")
    good = with_indices(saved, tmp_path / "good", lambda indices: indices.float())
    assert validate(saved.config, good, spec, Limits()).kind == "shira"

    def change(indices: torch.Tensor) -> torch.Tensor:
        floats = indices.float()
        floats[0, 3] = bad
        return floats

    with pytest.raises(InvalidAdapter, match="whole numbers") as caught:
        validate(saved.config, with_indices(saved, tmp_path / "w", change), spec, Limits())
    assert caught.value.where == f"{Q0}shira_indices"


def test_indices_in_half_precision_are_refused(save: Saver, spec: BaseSpec, tmp_path: Path) -> None:
    saved = saved_by(save, "shira")
    weights = with_indices(saved, tmp_path / "w", lambda indices: indices.half())
    with pytest.raises(InvalidAdapter, match="dtype F16, expected I32 or F32"):
        validate(saved.config, weights, spec, Limits())


@pytest.mark.parametrize("kind", ["lora", "shira"])
def test_whole_numbers_are_refused_where_none_belong(
    kind: str, save: Saver, spec: BaseSpec, tmp_path: Path
) -> None:
    saved = saved_by(save, kind)
    leaf = "lora_A.weight" if kind == "lora" else "shira_weight"
    tensors = load_file(str(saved.weights))
    save_file(tensors | {Q0 + leaf: tensors[Q0 + leaf].int()}, str(tmp_path / "w"))
    with pytest.raises(InvalidAdapter, match="dtype I32, expected one of F32") as caught:
        validate(saved.config, tmp_path / "w", spec, Limits())
    assert caught.value.where == Q0 + leaf


def test_block_sizes_are_peft_s() -> None:
    from peft.tuners.oft.layer import OFTLayer

    for width in (64, 96, 128, 896):
        for wanted in (*range(1, 40), 100, 500, 2000):
            peft = OFTLayer.adjust_oft_parameters(None, width, wanted)
            peft = wanted if width % wanted == 0 and wanted <= width else peft
            assert oft_block_size(width, 0, wanted) == peft
            assert oft_block_size(width, wanted, 0) == width // peft


def test_activations_are_transformers_own() -> None:
    from transformers.activations import ACT2FN

    assert set(ACTIVATION_NAMES) == set(ACTIVATIONS)
    x = torch.from_numpy(np.linspace(-6, 6, 1001, dtype=np.float32))
    for name, function in ACTIVATIONS.items():
        assert torch.allclose(function(x), ACT2FN[name](x), rtol=0, atol=1e-6), name
