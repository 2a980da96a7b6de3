"""PEANuT: ΔW is what a small network makes of W, so it is known once W is.

Zhong et al. 2024, "Parameter-Efficient Adaptation with Weight-Aware Neural Tweakers".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.activation import activation
from adapters.checks.amounts import count, factor
from adapters.checks.draft import Draft
from adapters.config_rules import COMMON, LAYERS, Rule, flag, present, rank, targets
from adapters.limits import Limits
from adapters.ranks import check_rank, check_scale
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    "r": rank,
    "depth": count(0, 32),
    "act_fn": activation,
    "scaling": factor,
    "exclude_modules": targets,
    "init_weights": flag,  # the file holds them
}


def check_peanut(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("PEANuT", config, RULES, header, spec)
    r, depth, scale = (present(config, name) for name in ("r", "depth", "scaling"))
    check_rank("every target", r, limits)
    check_scale("every target", scale, "scaling", "scaling", limits)
    held, why = 0, f" for rank {r}"
    for path in draft.paths:
        linear = spec.linears[path]
        draft.promise(path, "peanut_A.weight", r, linear.out_features, why=why)
        draft.promise(path, "peanut_B.weight", linear.out_features, r, why=why)
        for i in range(depth):
            draft.promise(path, f"peanut_encoders.{i}.weight", r, r, why=why)
            draft.promise(path, f"peanut_decoders.{i}.weight", r, r, why=why)
        held += r * (linear.in_features + linear.out_features)
    network = {"depth": depth, "act_fn": present(config, "act_fn"), "scaling": float(scale)}
    return draft.close("peanut", r, held, r=r, **network)
