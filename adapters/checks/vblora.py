"""VB-LoRA: every piece of A and B is a mixture of a few vectors of one bank.

Li et al. 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.modules import linears_of, touched, whole_modules
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
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
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import PREFIX, SHARED, Expected, consume
from adapters.ranks import check_rank
from adapters.safetensors_header import Header
from base.spec import BaseSpec


def _count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise InvalidAdapter(f"{str(value)[:80]}, expected an integer from 1", name)


RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "r": rank,
    "num_vectors": _count,
    "vector_length": _count,
    "topk": _count,
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
    apply_rules(config, RULES)
    paths, saved = linears_of(target_fields(config), spec, "VB-LoRA")
    r, vectors, length, topk = (
        int(present(config, name)) for name in ("r", "num_vectors", "vector_length", "topk")
    )
    check_rank("every target", r, limits)
    if topk > vectors:
        raise InvalidAdapter(f"{topk} of a bank of {vectors} vectors", "topk")
    promised = whole_modules(spec, saved)
    factors = 0
    for path in paths:
        linear, start = spec.linears[path], f"{PREFIX}{path}.vblora_logits_"
        if linear.in_features % length or linear.out_features % length:
            raise InvalidAdapter(
                f"{length} divides not both sides of {path}, "
                f"[{linear.out_features}, {linear.in_features}]",
                "vector_length",
            )
        across, down = linear.in_features // length, linear.out_features // length
        promised[f"{start}A"] = Expected(path, (r, across, vectors), "logits")
        promised[f"{start}B"] = Expected(path, (down, r, vectors), "logits")
        factors += r * (linear.in_features + linear.out_features)
    promised[f"{SHARED}vblora_vector_bank"] = Expected("", (vectors, length), "shared")
    found = consume(header.tensors, promised, spec, paths)
    return Checked(
        Validated(
            kind="vblora",
            rank=r,
            targets=touched(paths, saved),
            config={
                "peft_type": "VBLORA",
                "r": r,
                "num_vectors": vectors,
                "vector_length": length,
                "topk": topk,
                "target_modules": paths,
                "modules_to_save": saved or None,
            },
            parameters=numbers(found),
            memory_bytes=4 * (factors + numbers(found, "saved")),
        )
    )
