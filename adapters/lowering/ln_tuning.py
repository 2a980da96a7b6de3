"""LN tuning: the adapter's own norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.delta import Delta, PrivateNorm
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .whole import lower_saved


def lower_ln_tuning(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas = lower_saved(config, checkpoint, base)
    for path in config["target_modules"]:
        weight = checkpoint.take(f"{path}.ln_tuning_layers.weight", base.spec.norms[path])
        deltas[path] = PrivateNorm(weight.to(base.dtype))
    return deltas
