"""LN tuning: norms trained whole.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.modules import touched, whole_modules
from adapters.config_rules import COMMON, Rule, apply_rules, target_fields, targets
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import PREFIX, Expected, consume
from adapters.safetensors_header import Header
from adapters.targets import modules_of
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {**COMMON, "exclude_modules": targets}


def check_ln_tuning(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # no rank, no scale
    apply_rules(config, RULES)
    found_targets, found_saved = modules_of(target_fields(config), spec)
    paths, saved = sorted(found_targets), sorted(found_saved)
    wrong = next((path for path in paths if path not in spec.norms), None)
    if wrong:
        raise InvalidAdapter(
            f"{wrong} is no norm: use modules_to_save to replace it", "target_modules"
        )
    promised = whole_modules(spec, saved)
    for path in paths:
        name = f"{PREFIX}{path}.ln_tuning_layers.weight"
        promised[name] = Expected(path, (spec.norms[path],), "saved")
    found = consume(header.tensors, promised, spec, paths)
    return Checked(
        Validated(
            kind="ln_tuning",
            rank=0,
            targets=touched(paths, saved),
            config={
                "peft_type": "LN_TUNING",
                "target_modules": paths,
                "modules_to_save": saved or None,
            },
            parameters=numbers(found),
            memory_bytes=4 * numbers(found),
        )
    )
