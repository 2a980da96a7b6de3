"""MiSS: x is cut into pieces of r numbers, and one matrix [r, out] is applied to their sum.

Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
Structure".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.modules import linears_of, touched, whole_modules
from adapters.config_rules import (
    COMMON,
    LAYERS,
    Rule,
    apply_rules,
    ignore,
    one_of,
    present,
    rank,
    target_fields,
    targets,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import PREFIX, Expected, consume
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
    apply_rules(config, RULES)
    paths, saved = linears_of(target_fields(config), spec, "MiSS")
    r = int(present(config, "r"))
    mini = int(present(config, "mini_r")) if config.get("init_weights") == "mini" else None
    check_rank("every target", r, limits)
    promised = whole_modules(spec, saved)
    for path in paths:
        linear = spec.linears[path]
        if r > linear.in_features:
            raise InvalidAdapter(f"{r} is wider than {path}, {linear.in_features}", "r")
        if mini and linear.out_features % mini:
            raise InvalidAdapter(f"{mini} divides not {linear.out_features}, {path}", "mini_r")
        shape = (r, mini or linear.out_features)
        promised[f"{PREFIX}{path}.miss_block"] = Expected(path, shape, "block", f" for rank {r}")
    found = consume(header.tensors, promised, spec, paths)
    sums = sum({spec.linears[path].in_features for path in paths})  # one A for each width
    blocks = sum(spec.linears[path].out_features for path in paths)
    return Checked(
        Validated(
            kind="miss",
            rank=r,
            targets=touched(paths, saved),
            config={
                "peft_type": "MISS",
                "r": r,
                "init_weights": "mini" if mini else True,
                "mini_r": mini or 1,
                "target_modules": paths,
                "modules_to_save": saved or None,
            },
            parameters=numbers(found),
            memory_bytes=4 * (r * (sums + blocks) + numbers(found, "saved")),
        )
    )
