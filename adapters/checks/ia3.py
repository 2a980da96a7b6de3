"""IA3: one vector for each target, on the input of feed-forward layers, on the output of others.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.modules import linears_of, touched, whole_modules
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    Rule,
    apply_rules,
    ignore,
    present,
    target_fields,
    targets,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import PREFIX, Expected, consume
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **FAN_IN,
    "exclude_modules": targets,
    "feedforward_modules": targets,
    "init_ia3_weights": ignore,  # the file holds the vectors
}


def check_ia3(config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # an IA3 has no rank
    apply_rules(config, RULES)
    fields = target_fields(config)
    paths, saved = linears_of(fields, spec, "IA3")
    names = _feed_forward(config)
    inputs = [path for path in paths if _on_input(names, path)]
    promised = whole_modules(spec, saved)
    biases = 0
    for path in paths:
        linear = spec.linears[path]
        on_input = path in inputs
        shape = (1, linear.in_features) if on_input else (linear.out_features, 1)
        why = " on the input" if on_input else " on the output"
        promised[f"{PREFIX}{path}.ia3_l"] = Expected(path, shape, "vector", why)
        if linear.bias and not on_input:
            biases += linear.out_features  # the base's own bias, scaled, is kept beside the vector
    found = consume(header.tensors, promised, spec, paths)
    return Checked(
        Validated(
            kind="ia3",
            rank=0,
            targets=touched(paths, saved),
            config={
                "peft_type": "IA3",
                "target_modules": paths,
                "feedforward_modules": inputs,
                "modules_to_save": saved or None,
            },
            parameters=numbers(found),
            memory_bytes=4 * (numbers(found) + biases),
        )
    )


def _feed_forward(config: Mapping[str, Any]) -> str | list[str]:
    names: str | list[str] = present(config, "feedforward_modules")
    wanted = config["target_modules"]
    if isinstance(names, list) and isinstance(wanted, list):
        missing = sorted(set(names) - set(wanted))
        if missing:
            raise InvalidAdapter(f"{missing[0]} is not in target_modules", "feedforward_modules")
    return names


def _on_input(names: str | list[str], path: str) -> bool:
    """PEFT's rule (`_check_target_module_feedforward`): a bare suffix, no dot needed before it."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path.endswith(name) for name in names)
