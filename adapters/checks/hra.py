"""HRA: a product of Householder reflections on the input of each target.

Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder
Reflection Adaptation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.config_rules import COMMON, LAYERS, Rule, flag, ignore, one_of, present, rank, targets
from adapters.limits import Limits
from adapters.ranks import check_rank
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    "r": rank,
    "apply_GS": flag,
    "exclude_modules": targets,
    "init_weights": ignore,  # the file holds them
    "bias": one_of("none"),
}


def check_hra(config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("HRA", config, RULES, header, spec)
    r = int(present(config, "r"))
    check_rank("every target", r, limits)
    factors = 0
    for path in draft.paths:
        linear = spec.linears[path]
        draft.promise(path, "hra_u", linear.in_features, r, why=f" for rank {r}")
        factors += r * (linear.in_features + linear.out_features)
    return draft.close("hra", r, factors, r=r, apply_GS=bool(config.get("apply_GS")))
