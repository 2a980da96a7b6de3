"""DEFT: a projection is taken out of W, and a low-rank term put in its place.

PEFT's `DeftConfig` names the method and its two projections, "relu" and "qr".
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
    alpha,
    flag,
    ignore,
    one_of,
    present,
    rank,
    targets,
)
from adapters.limits import Limits
from adapters.ranks import check_rank, check_scale
from adapters.safetensors_header import Header
from base.spec import BaseSpec


def _alpha(name: str, value: Any) -> None:
    if value is not None:
        alpha(name, value)


RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "r": rank,
    "alpha": _alpha,
    "decomposition_method": one_of("relu", "qr"),
    "para": flag,
    "exclude_modules": targets,
    "init_scale": ignore,  # the file holds what became of it
    "init_weights": ignore,
    "deft_dropout": ignore,  # off at inference
    "bias": one_of("none"),
}


def check_deft(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("DEFT", config, RULES, header, spec)
    r, a = int(present(config, "r")), config.get("alpha")
    bare = bool(config.get("para"))
    ranks = {path: min(r, spec.linears[path].out_features) for path in draft.paths}
    factors = 0
    for path, own in ranks.items():
        linear, why = spec.linears[path], f" for rank {own}"
        check_rank(path, own, limits)
        if a:
            check_scale(path, a / own, f"alpha {a:g}, rank {own}", "alpha", limits)
        draft.promise(path, "deft_P", linear.out_features, own, why=why)
        if not bare:
            draft.promise(path, "deft_R", own, linear.in_features, why=why)
        factors += own * (linear.in_features + linear.out_features)
    method = present(config, "decomposition_method")
    fields = {"r": r, "alpha": a, "decomposition_method": method, "para": bare}
    return draft.close("deft", max(ranks.values()), factors, **fields)
