"""VB-LoRA: every piece of A and B is a mixture of a few vectors of one bank.

Li et al. 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks".
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
    ignore,
    one_of,
    present,
    rank,
    refuse,
    targets,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.ranks import check_rank
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "r": rank,
    "num_vectors": count,
    "vector_length": count,
    "topk": count,
    "exclude_modules": targets,
    "save_only_topk_weights": refuse("the file must hold the logits: save it without this"),
    "vblora_dropout": ignore,  # off at inference
    "init_vector_bank_bound": ignore,  # the file holds the bank and the logits
    "init_logits_std": ignore,
    "bias": one_of("none"),
}


def check_vblora(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("VB-LoRA", config, RULES, header, spec)
    r, vectors, length, topk = (
        int(present(config, name)) for name in ("r", "num_vectors", "vector_length", "topk")
    )
    check_rank("every target", r, limits)
    if topk > vectors:
        raise InvalidAdapter(f"{topk} of a bank of {vectors} vectors", "topk")
    factors = 0
    for path in draft.paths:
        linear = spec.linears[path]
        if linear.in_features % length or linear.out_features % length:
            raise InvalidAdapter(
                f"{length} divides not both sides of {path}, "
                f"[{linear.out_features}, {linear.in_features}]",
                "vector_length",
            )
        across, down = linear.in_features // length, linear.out_features // length
        draft.promise(path, "vblora_logits_A", r, across, vectors, role="logits")
        draft.promise(path, "vblora_logits_B", down, r, vectors, role="logits")
        factors += r * (linear.in_features + linear.out_features)
    draft.promise_shared("vblora_vector_bank", vectors, length)
    bank = {"num_vectors": vectors, "vector_length": length, "topk": topk}
    return draft.close("vblora", r, factors, r=r, **bank)
