"""RoAd: pairs of the output are turned and scaled, each by angles and factors of its own.

Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
Composability".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.amounts import count
from adapters.checks.draft import Draft
from adapters.config_rules import COMMON, Rule, flag, one_of, present
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.safetensors_header import Header
from base.spec import BaseSpec

# Angles, and factors, of each pair.
VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}

RULES: Mapping[str, Rule] = {
    **COMMON,
    "variant": one_of(*VARIANTS),
    "group_size": count(2, 1 << 16),
    "init_weights": flag,  # the file holds them
}


def check_road(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # no rank, no scale
    draft = Draft("RoAd", config, RULES, header, spec)
    variant, group = str(present(config, "variant")), int(present(config, "group_size"))
    if group % 2:
        raise InvalidAdapter(
            f"{group}, expected an even number: a group is made of pairs", "group_size"
        )
    held = 0
    for path in draft.paths:
        linear = spec.linears[path]
        if linear.out_features % group:
            raise InvalidAdapter(
                f"{group} divides not {linear.out_features}, the output of {path}", "group_size"
            )
        angles = linear.out_features // 2 * VARIANTS[variant]
        for leaf in ("road_theta", "road_alpha"):
            draft.promise(path, leaf, angles, role="vector", why=f" for {variant}")
        held += linear.out_features * (3 if linear.bias else 2)  # the bias turns too
    return draft.close("road", 0, held, variant=variant, group_size=group)
