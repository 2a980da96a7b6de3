"""GraLoRA: W is cut into k x k blocks, each with a LoRA of rank r / k.

Jung et al. 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning".
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
    count,
    ignore,
    one_of,
    present,
    rank,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.ranks import check_rank, check_scale
from adapters.safetensors_header import Header
from base.spec import BaseSpec


def _hybrid(name: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise InvalidAdapter(f"rank {str(value)[:80]}, expected an integer from 0", name)


RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "r": rank,
    "hybrid_r": _hybrid,
    "alpha": alpha,
    "gralora_k": count,
    "gralora_dropout": ignore,  # off at inference
    "init_weights": ignore,  # the file holds them
    "bias": one_of("none"),
}


def check_gralora(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("GraLoRA", config, RULES, header, spec)
    r, hybrid, k = (int(present(config, name)) for name in ("r", "hybrid_r", "gralora_k"))
    a = float(present(config, "alpha"))
    if r % k:
        raise InvalidAdapter(f"{k} divides not the rank {r}", "gralora_k")
    served = k * r + hybrid
    check_rank("every target", served, limits, f" ({k} x {r} + {hybrid}, as LoRA)")
    scale = f"alpha {a:g}, rank {r} + {hybrid}"
    check_scale("every target", a / (r + hybrid), scale, "alpha", limits)
    factors = 0
    for path in draft.paths:
        m, n = spec.linears[path].out_features, spec.linears[path].in_features
        if m % k or n % k:
            raise InvalidAdapter(f"{k} divides not both sides of {path}, [{m}, {n}]", "gralora_k")
        draft.promise(path, "gralora_A", k, n // k, r, why=f" for rank {r}")
        draft.promise(path, "gralora_B", k, r, m // k, why=f" for rank {r}")
        if hybrid:
            draft.promise(path, "gralora_A_general.weight", hybrid, n)
            draft.promise(path, "gralora_B_general.weight", m, hybrid)
        factors += served * (m + n)
    fields = {"r": r, "hybrid_r": hybrid, "gralora_k": k, "alpha": a}
    return draft.close("gralora", served, factors, **fields)
