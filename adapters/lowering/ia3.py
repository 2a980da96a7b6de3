"""IA3: p = l on feed-forward layers; on others g = l, and the bias is scaled with the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .whole import lower_saved


def lower_ia3(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas = lower_saved(config, checkpoint, base)
    for path in config["target_modules"]:
        shape, linear = base.spec.linears[path], base.linear(path)
        checkpoint.take_base_copy(path, linear.weight)
        name = f"{path}.ia3_l"
        if path in config["feedforward_modules"]:
            deltas[path] = LinearDelta(p=checkpoint.take(name, 1, shape.in_features).flatten())
            continue
        gain = checkpoint.take(name, shape.out_features, 1).flatten()
        bias = None if linear.bias is None else gain * linear.bias.detach().float()
        deltas[path] = LinearDelta(g=gain, bias=bias)
    return deltas
