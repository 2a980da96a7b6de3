"""BEFT: b_eff = b + Δb."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .whole import lower_saved


def lower_beft(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas = lower_saved(config, checkpoint, base)
    for path in config["target_modules"]:
        shape, linear = base.spec.linears[path], base.linear(path)
        checkpoint.take_base_copy(path, linear.weight)
        bias = checkpoint.take(f"{path}.beft_bias", 1, shape.out_features).flatten()
        if linear.bias is not None:
            bias = bias + linear.bias.detach().float()
        deltas[path] = LinearDelta(bias=bias)
    return deltas
