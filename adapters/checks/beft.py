"""BEFT: a trained addition to the bias of each target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.modules import linears_of, touched, whole_modules
from adapters.config_rules import COMMON, Rule, apply_rules, flag, target_fields
from adapters.limits import Limits
from adapters.promises import PREFIX, Expected, consume
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {**COMMON, "init_weights": flag}


def check_beft(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # no rank, no scale
    apply_rules(config, RULES)
    paths, saved = linears_of(target_fields(config), spec, "BEFT")
    promised = whole_modules(spec, saved)
    for path in paths:
        shape = (1, spec.linears[path].out_features)
        promised[f"{PREFIX}{path}.beft_bias"] = Expected(path, shape, "vector")
    found = consume(header.tensors, promised, spec, paths)
    return Checked(
        Validated(
            kind="beft",
            rank=0,
            targets=touched(paths, saved),
            config={
                "peft_type": "BEFT",
                "target_modules": paths,
                "modules_to_save": saved or None,
            },
            parameters=numbers(found),
            memory_bytes=4 * numbers(found),
        )
    )
