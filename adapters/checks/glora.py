"""GLoRA: W' = W + W ⊙ A + B and b' = b + b ⊙ D + E + W C, each of A to E in a form of its own.

Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.checks.modules import private
from adapters.config_rules import COMMON, Rule, ignore, one_of, present, rank
from adapters.limits import Limits
from adapters.ranks import check_rank
from adapters.safetensors_header import Header
from base.spec import BaseSpec, LinearShape

RULES: Mapping[str, Rule] = {
    **COMMON,
    "r": rank,
    "config_A_B": one_of("lora", "vector", "constant", "none"),
    "config_C": one_of("lora", "vector", "none"),
    "config_D_E": one_of("vector", "constant", "none"),
    "init_weights": ignore,  # the file holds them
    "bias": one_of("none"),
}
Shape = tuple[int, ...]


def check_glora(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("GLoRA", config, RULES, header, spec)
    r = int(present(config, "r"))
    check_rank("every target", r, limits)
    forms = {name: present(config, name) for name in ("config_A_B", "config_C", "config_D_E")}
    for path in draft.paths:
        for part, (form, shape) in parts_of(forms, spec.linears[path]).items():
            if form == "none":  # PEFT saves zeros, which lowering looks at
                draft.allow(path, f"{part}.zeros", *shape)
            for leaf, own in leaves_of(form, shape, r).items():
                draft.promise(path, f"{part}.{leaf}", *own)
    held = private(draft.paths, spec)
    if forms["config_A_B"] == "none":  # the bias alone
        held = sum(spec.linears[p].out_features for p in draft.paths if spec.linears[p].bias)
    return draft.close("glora", 0, held, r=r, **forms)


def parts_of(forms: Mapping[str, str], linear: LinearShape) -> dict[str, tuple[str, Shape]]:
    """The form of each of A to E, and its shape written out; without a bias the last three rest."""
    m, n = linear.out_features, linear.in_features
    changes, shift, bias = forms["config_A_B"], forms["config_C"], forms["config_D_E"]
    return {
        "glora_A": (changes, (m, n)),
        "glora_B": (changes, (m, n)),
        "glora_C": (shift if linear.bias else "none", (n, 1)),
        "glora_D": (bias if linear.bias else "none", (m,)),
        "glora_E": (bias if linear.bias else "none", (m,)),
    }


def leaves_of(form: str, shape: Shape, r: int) -> dict[str, Shape]:
    """The tensors of one part in the file."""
    if form == "lora":
        return {"Xd": (shape[0], r), "Xu": (r, shape[1])}
    if form == "vector":
        return {"X": shape if len(shape) == 1 else (shape[0], 1)}
    return {"X": (1,)} if form == "constant" else {}
