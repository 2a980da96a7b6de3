"""VeRA: one random A and B for all layers, and two trained vectors for each.

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.modules import linears_of, shared_sizes, touched, whole_modules
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
    Rule,
    apply_rules,
    flag,
    ignore,
    one_of,
    present,
    rank,
    seed,
    target_fields,
)
from adapters.limits import Limits
from adapters.promises import PREFIX, SHARED, Expected, consume
from adapters.ranks import check_rank
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "r": rank,
    "projection_prng_key": seed,
    "save_projection": flag,
    "vera_dropout": ignore,  # off at inference
    "d_initial": ignore,  # the file holds what became of it
    "init_weights": flag,
    "bias": one_of("none"),
}


def check_vera(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    apply_rules(config, RULES)
    paths, saved = linears_of(target_fields(config), spec, "VeRA")
    r, kept = int(present(config, "r")), present(config, "save_projection")
    key = None if kept else int(present(config, "projection_prng_key"))
    check_rank("every target", r, limits)
    width = max(spec.linears[path].in_features for path in paths)
    height = max(spec.linears[path].out_features for path in paths)
    promised = whole_modules(spec, saved)
    for path in paths:
        start = f"{PREFIX}{path}.vera_lambda_"
        promised[f"{start}b"] = Expected(path, (spec.linears[path].out_features,), "vector")
        promised[f"{start}d"] = Expected(path, (r,), "vector", f" for rank {r}")
    if kept:
        # As wide and as high as the largest target wants; the others take a corner.
        promised[f"{SHARED}vera_A"] = Expected("", (r, width), "shared", f" for rank {r}")
        promised[f"{SHARED}vera_B"] = Expected("", (height, r), "shared", f" for rank {r}")
    found = consume(header.tensors, promised, spec, paths)
    return Checked(
        Validated(
            kind="vera",
            rank=r,
            targets=touched(paths, saved),
            config={
                "peft_type": "VERA",
                "r": r,
                "target_modules": paths,
                "save_projection": kept,
                "projection_prng_key": key,
                "modules_to_save": saved or None,
            },
            parameters=numbers(found),
            memory_bytes=4 * (numbers(found, "vector", "saved") + r * shared_sizes(paths, spec)),
        )
    )
