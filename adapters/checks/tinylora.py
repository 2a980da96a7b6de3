"""TinyLoRA: a few numbers steer a small matrix between two factors of the weight.

PEFT's `TinyLoraConfig` describes it; the factors of the weight's decomposition are in the file, so
it does not matter that NF4 rounds the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
    Rule,
    count,
    flag,
    ignore,
    one_of,
    present,
    rank,
    seed,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.ranks import check_rank
from adapters.safetensors_header import Header
from base.spec import BaseSpec


def _tying(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise InvalidAdapter(f"{str(value)[:80]}, expected a number from 0 to 1", name)


RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "r": rank,
    "u": count,
    "weight_tying": _tying,
    "projection_seed": seed,
    "save_projection": flag,
    "init_v_bound": ignore,  # the file holds what became of it
    "init_weights": ignore,
    "tinylora_dropout": ignore,  # off at inference
    "bias": one_of("none"),
}


def check_tinylora(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("TinyLoRA", config, RULES, header, spec)
    r, u = int(present(config, "r")), int(present(config, "u"))
    kept = present(config, "save_projection")
    first = 0 if kept else int(present(config, "projection_seed"))
    chosen = set(draft.paths)
    order = [path for path in spec.linears if path in chosen]  # PEFT counts them as the model does
    groups = _groups(order, float(present(config, "weight_tying")))
    factors, largest = 0, 0
    for path in order:
        m, n = spec.linears[path].out_features, spec.linears[path].in_features
        own = min(r, m, n)
        check_rank(path, own, limits)
        draft.promise(path, "tinylora_A", own, n, why=f" for rank {own}")
        draft.promise(path, "tinylora_B", m, own, why=f" for rank {own}")
        if kept:
            draft.promise(path, "tinylora_P", u, own, own, why=f" for rank {own}")
        factors, largest = factors + own * (m + n), max(largest, own)
    for group in sorted(set(groups.values())):
        draft.promise_shared(f"tinylora_v.{group}", u)
    seeds = None if kept else {path: first + at for at, path in enumerate(order)}
    return draft.close("tinylora", largest, factors, r=r, u=u, groups=groups, seeds=seeds)


def _groups(order: list[str], tying: float) -> dict[str, int]:
    """Which vector each target uses: PEFT's rule (`TinyLoraModel._create_and_replace`)."""
    groups = max(1, round(len(order) * (1.0 - tying)))
    size = max(1, len(order) // groups)
    return {path: min(at // size, groups - 1) for at, path in enumerate(order)}
