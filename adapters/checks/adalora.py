"""AdaLoRA: B diag(E) A, each layer with the rank that its pruning left.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.modules import linears_of, touched, whole_modules
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
    MAX_PATTERNS,
    Rule,
    apply_rules,
    ignore,
    one_of,
    present,
    rank,
    refuse,
    target_fields,
    targets,
)
from adapters.config_schema import HARMLESS, REFUSED, init
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import PREFIX, Expected, consume
from adapters.ranks import check_rank, check_scale
from adapters.safetensors_header import Header
from base.spec import BaseSpec

LEAF = ".lora_E"  # PEFT's keys of rank_pattern are names of these tensors
PRUNING = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")


def _alpha(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise InvalidAdapter(f"alpha {str(value)[:80]}, expected a number above 0", name)


def _masks(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise InvalidAdapter(f"expected an object of at most {MAX_PATTERNS} entries", name)
    for key, mask in value.items():
        if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
            raise InvalidAdapter("expected a list of true and false", f"{name}[{key[:80]!r}]")


RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    **dict.fromkeys(HARMLESS, ignore),
    **{name: refuse(reason) for name, reason in REFUSED.items()},
    **dict.fromkeys(PRUNING, ignore),  # how the ranks came about; rank_pattern says what they are
    "total_step": ignore,
    "r": ignore,  # AdaLoRA has init_r in its place
    "init_r": rank,
    "lora_alpha": _alpha,
    "rank_pattern": _masks,
    "alpha_pattern": refuse("AdaLoRA has one alpha for all targets"),
    "exclude_modules": targets,
    "bias": one_of("none"),
    "use_rslora": refuse("AdaLoRA has a scale of its own, and PEFT ignores this"),
    "use_dora": refuse("there is no AdaLoRA with DoRA"),
    "alora_invocation_tokens": refuse("there is no AdaLoRA that an invocation switches on"),
    "lora_bias": refuse("there is no AdaLoRA with a bias on B"),
    "loftq_config": refuse("there is no AdaLoRA with LoftQ"),
    "ensure_weight_tying": refuse("AdaLoRA adapts no embeddings"),
    "trainable_token_indices": refuse("tokens are not trained beside AdaLoRA here; use a LoRA"),
    "init_lora_weights": init,
}


def check_adalora(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    apply_rules(config, RULES)
    paths, saved = linears_of(target_fields(config), spec, "AdaLoRA")
    first, alpha = int(present(config, "init_r")), float(present(config, "lora_alpha"))
    check_rank("every target", first, limits)
    check_scale("every target", alpha / first, f"alpha {alpha:g}", "lora_alpha", limits)
    ranks = _ranks(config.get("rank_pattern") or {}, paths, first)
    promised = whole_modules(spec, saved)
    factors = 0
    for path, own in ranks.items():
        linear, start, why = spec.linears[path], f"{PREFIX}{path}.lora_", f" for rank {own}"
        promised[f"{start}A"] = Expected(path, (own, linear.in_features), "factor", why)
        promised[f"{start}B"] = Expected(path, (linear.out_features, own), "factor", why)
        promised[f"{start}E"] = Expected(path, (own, 1), "factor", why)
        factors += own * (linear.in_features + linear.out_features)
    found = consume(header.tensors, promised, spec, paths)
    return Checked(
        Validated(
            kind="adalora",
            rank=max(ranks.values()),
            targets=touched(paths, saved),
            config={
                "peft_type": "ADALORA",
                "init_r": first,
                "lora_alpha": alpha,
                "target_modules": paths,
                "rank_pattern": {
                    path + LEAF: [n < own for n in range(first)]
                    for path, own in ranks.items()
                    if own != first
                },
                "modules_to_save": saved or None,
            },
            parameters=numbers(found),
            memory_bytes=4 * (factors + numbers(found, "saved")),
        )
    )


def _ranks(masks: Mapping[str, list[bool]], paths: Sequence[str], first: int) -> dict[str, int]:
    """The rank of each target: how many places of its mask are true."""
    unknown = sorted(masks.keys() - {path + LEAF for path in paths})
    if unknown:
        raise InvalidAdapter(
            f"{unknown[0][:80]!r} is no target: expected <module path>{LEAF}", "rank_pattern"
        )
    for key, mask in masks.items():
        if len(mask) != first:
            raise InvalidAdapter(
                f"{len(mask)} places for {key}, expected init_r = {first}", "rank_pattern"
            )
        if not any(mask):
            raise InvalidAdapter(
                f"{key} was pruned to rank 0, which cannot be stored: leave it out of "
                "target_modules",
                "rank_pattern",
            )
    return {path: sum(masks.get(path + LEAF, [True] * first)) for path in paths}
