"""AdaLoRA: E is folded into B, with the scale that PEFT divides by the rank before pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import low_rank
from .whole import lower_saved

_EPSILON = 1e-5  # PEFT's, against a rank of zero; part of what the adapter was trained with


def lower_adalora(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas, take = lower_saved(config, checkpoint, base), checkpoint.take
    scale = config["lora_alpha"] / (config["init_r"] + _EPSILON)
    for path in config["target_modules"]:
        shape = base.spec.linears[path]
        checkpoint.take_base_copy(path, base.linear(path).weight)
        rank = sum(config["rank_pattern"].get(f"{path}.lora_E", [True] * config["init_r"]))
        A = take(f"{path}.lora_A", rank, shape.in_features)
        B = take(f"{path}.lora_B", shape.out_features, rank)
        E = take(f"{path}.lora_E", rank, 1)
        deltas[path] = LinearDelta((low_rank(A, B * (E.flatten() * scale), base),))
    return deltas
