"""HiRA: the elementwise product of W and a low-rank matrix is added to W.

Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language
Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.checks.modules import private
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
    Rule,
    ignore,
    present,
    rank,
    targets,
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
    "rank_pattern": ignore,  # PEFT reads it, and gives every layer the rank r all the same
    "exclude_modules": targets,
    "hira_dropout": ignore,  # off at inference
    "init_weights": ignore,  # the file holds them
}


def check_hira(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("HiRA", config, RULES, header, spec)
    r = int(present(config, "r"))
    check_rank("every target", r, limits)
    for path in draft.paths:
        linear, why = spec.linears[path], f" for rank {r}"
        draft.promise(path, "hira_A", r, linear.in_features, why=why)
        draft.promise(path, "hira_B", linear.out_features, r, why=why)
    return draft.close("hira", 0, private(draft.paths, spec), r=r)
