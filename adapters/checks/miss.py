"""MiSS: x is cut into pieces of r numbers, and one matrix [r, out] is applied to their sum.

Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
Structure".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.config_rules import COMMON, LAYERS, Rule, ignore, one_of, present, rank, targets
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.ranks import check_rank
from adapters.safetensors_header import Header
from base.spec import BaseSpec


def _variant(name: str, value: Any) -> None:
    if value == "bat":
        raise InvalidAdapter("'bat' multiplies the base's weights, and is not served", name)
    one_of(True, False, "mini")(name, value)


RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    "r": rank,
    "mini_r": rank,
    "init_weights": _variant,
    "miss_dropout": ignore,  # off at inference
    "exclude_modules": targets,
    "bias": one_of("none"),
}


def check_miss(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("MiSS", config, RULES, header, spec)
    r = int(present(config, "r"))
    mini = int(present(config, "mini_r")) if config.get("init_weights") == "mini" else None
    check_rank("every target", r, limits)
    shapes = [spec.linears[path] for path in draft.paths]
    for path, linear in zip(draft.paths, shapes, strict=True):
        if r > linear.in_features:
            raise InvalidAdapter(f"{r} is wider than {path}, {linear.in_features}", "r")
        if mini and linear.out_features % mini:
            raise InvalidAdapter(f"{mini} divides not {linear.out_features}, {path}", "mini_r")
        width = mini or linear.out_features
        draft.promise(path, "miss_block", r, width, role="block", why=f" for rank {r}")
    sums = sum({shape.in_features for shape in shapes})  # one A for each width
    blocks = sum(shape.out_features for shape in shapes)
    variant = {"init_weights": "mini" if mini else True, "mini_r": mini or 1}
    return draft.close("miss", r, r * (sums + blocks), r=r, **variant)
