"""Uni-LoRA: every number of A and B is one of a short vector's, scaled; a seed says which.

Li et al. 2025, "Uni-LoRA: One Vector is All You Need".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
    Rule,
    count,
    ignore,
    one_of,
    present,
    rank,
    refuse,
    seed,
)
from adapters.limits import Limits
from adapters.ranks import check_rank
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "r": rank,
    "proj_seed": seed,
    "theta_d_length": count,
    "save_indices": refuse("the seed gives the indices: save without them"),
    "unilora_dropout": ignore,  # off at inference
    "init_theta_d_bound": ignore,  # the file holds what became of it
    "init_weights": ignore,
    "bias": one_of("none"),
}


def check_unilora(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("Uni-LoRA", config, RULES, header, spec)
    r, length = int(present(config, "r")), int(present(config, "theta_d_length"))
    check_rank("every target", r, limits)
    draft.promise_shared("unilora_theta_d", length)
    shapes = [spec.linears[path] for path in draft.paths]
    factors = r * sum(shape.in_features + shape.out_features for shape in shapes)
    chosen = set(draft.paths)
    fields = {
        "r": r,
        "theta_d_length": length,
        "proj_seed": int(present(config, "proj_seed")),
        # The indices are dealt out in the order in which the model holds its layers.
        "order": [path for path in spec.linears if path in chosen],
    }
    return draft.close("unilora", r, factors, **fields)
