"""PVeRA: VeRA with a spread around its inner vector, which is left out at inference.

Its mean is what PEFT computes with unless `sample_at_inference` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.checks.modules import shared_sizes
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
    Rule,
    flag,
    ignore,
    one_of,
    present,
    rank,
    refuse,
    seed,
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
    "projection_prng_key": seed,
    "save_projection": flag,
    "sample_at_inference": refuse("a reply would depend on chance: save without it"),
    "generator_seed": ignore,  # of the samples
    "pvera_dropout": ignore,  # off at inference
    "d_initial": ignore,  # the file holds what became of it
    "init_weights": flag,
    "bias": one_of("none"),
}


def check_pvera(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("PVeRA", config, RULES, header, spec)
    r, kept = int(present(config, "r")), present(config, "save_projection")
    key = None if kept else int(present(config, "projection_prng_key"))
    check_rank("every target", r, limits)
    vectors = 0
    for path in draft.paths:
        linear = spec.linears[path]
        draft.promise(path, "pvera_lambda_b", linear.out_features, role="vector")
        draft.promise(path, "pvera_lambda_d", 2 * r, role="vector", why=f" for rank {r}")
        vectors += linear.out_features + r
    if kept:
        width = max(spec.linears[path].in_features for path in draft.paths)
        height = max(spec.linears[path].out_features for path in draft.paths)
        draft.promise_shared("pvera_A", 2 * r, width, why=f" for rank {r}")
        draft.promise_shared("pvera_B", height, r, why=f" for rank {r}")
    held = vectors + r * shared_sizes(draft.paths, spec)
    fields = {"r": r, "save_projection": kept, "projection_prng_key": key}
    return draft.close("pvera", r, held, **fields)
