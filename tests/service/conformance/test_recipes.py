"""Every kind that is served has a recipe, and every recipe says something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftType
from safetensors.torch import load_file

from adapters.lowering import FAMILIES
from adapters.methods import METHODS
from service.conformance.recipes import ELSEWHERE, RECIPES, make_adapter
from service.conformance.suite import served_kinds


def test_each_kind_that_is_served_has_a_recipe() -> None:
    """A method that is lowered without one fails here: `nibble conformance` would leave it out."""
    assert set(FAMILIES) - RECIPES.keys() - ELSEWHERE.keys() == set()
    assert not RECIPES.keys() & ELSEWHERE.keys()
    resized = {kind for kind, recipe in RECIPES.items() if recipe.new_tokens}
    assert set(served_kinds()) == (set(FAMILIES) - ELSEWHERE.keys()) | resized


def test_each_row_of_the_registry_that_serves_has_a_recipe() -> None:
    served = {name for name, row in METHODS.items() if row.form}
    known = {recipe.peft_type or kind.upper() for kind, recipe in RECIPES.items()}
    assert served - known - {kind.upper() for kind in ELSEWHERE} == set()


def test_recipes_are_of_methods_of_peft() -> None:
    methods = {method.value for method in PeftType}
    assert {recipe.peft_type or kind.upper() for kind, recipe in RECIPES.items()} <= methods


@pytest.mark.parametrize("kind", ["lora", "trainable_tokens", "ln_tuning"])
def test_what_is_saved_is_seeded_and_says_something(
    kind: str, base_directory: Path, tmp_path: Path
) -> None:
    files = [
        make_adapter(tmp_path / name, base_directory, kind, **options) / "adapter_model.safetensors"
        for name, options in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"zero": True}))
    ]
    a, b, c, d = (load_file(str(file)) for file in files)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert not all(torch.equal(a[name], d[name]) for name in a)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == (RECIPES[kind].peft_type or kind.upper())
