"""RandLoRA: random low-rank terms, as many as make full rank, with trained scales.

Albert et al. 2025, "RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models".
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
    alpha,
    flag,
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


def _saved(name: str, value: Any) -> None:
    flag(name, value)
    if value is False:
        raise InvalidAdapter(
            "the matrices would be drawn anew in half precision, which differs between machines: "
            "save with save_projection",
            name,
        )


RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "r": rank,
    "randlora_alpha": alpha,
    "save_projection": _saved,
    "projection_prng_key": ignore,  # the file holds what was drawn
    "sparse": ignore,
    "very_sparse": ignore,
    "randlora_dropout": ignore,  # off at inference
    "init_weights": ignore,
    "bias": one_of("none"),
}


def check_randlora(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("RandLoRA", config, RULES, header, spec)
    r, a = int(present(config, "r")), float(present(config, "randlora_alpha"))
    check_rank("every target", r, limits)
    check_scale("every target", a / r, f"alpha {a:g}, rank {r}", "randlora_alpha", limits)
    shapes = [spec.linears[path] for path in draft.paths]
    sides = max(s.out_features for s in shapes), max(s.in_features for s in shapes)
    short, long = min(sides), max(sides)
    projections = {"randlora_A": (r, 1, short), "randlora_B": (long, -(-short // r), r)}
    for name, shape in projections.items():
        draft.promise_shared(name, *shape, why=f" for rank {r}")
    for path, linear in zip(draft.paths, shapes, strict=True):
        own = min(linear.out_features, linear.in_features)
        bases = -(-own // r)
        draft.promise(path, "randlora_lambda", r, bases)
        draft.promise(path, "randlora_gamma", bases, own)
        for name, shape in projections.items():
            draft.allow(path, name, *shape)
    fields = {"r": r, "randlora_alpha": a, "short_side": short, "long_side": long}
    return draft.close("randlora", 0, private(draft.paths, spec), **fields)
