"""DeLoRA: a LoRA with normalised factors, whose strength is one trained number.

Bini et al. 2025, "DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.config_rules import (
    COMMON,
    LAYERS,
    Rule,
    ignore,
    one_of,
    pattern,
    present,
    rank,
    targets,
)
from adapters.limits import Limits
from adapters.ranks import check_rank, ranks_of
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    "r": rank,
    "rank_pattern": pattern(rank),
    "exclude_modules": targets,
    "module_dropout": ignore,  # off at inference
    "delora_lambda": ignore,  # the file holds what became of it
    "lambda_pattern": ignore,
    "init_weights": ignore,
    "bias": one_of("none"),
}


def check_delora(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("DeLoRA", config, RULES, header, spec)
    r = int(present(config, "r"))
    ranks = ranks_of(config.get("rank_pattern") or {}, r, draft.paths)
    factors = 0
    for path, own in ranks.items():
        linear, why = spec.linears[path], f" for rank {own}"
        check_rank(path, own, limits)
        draft.promise(path, "delora_A", own, linear.in_features, why=why)
        draft.promise(path, "delora_B", linear.out_features, own, why=why)
        draft.promise(path, "delora_lambda", 1, role="scalar")
        draft.promise(path, "delora_w_norm", linear.in_features, role="vector")
        factors += own * (linear.in_features + linear.out_features)
    patterns = {path: own for path, own in ranks.items() if own != r}
    return draft.close("delora", max(ranks.values()), factors, r=r, rank_pattern=patterns)
