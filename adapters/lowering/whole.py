"""modules_to_save: modules that an adapter replaces whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.delta import Delta, PrivateEmbedding, PrivateLinear, PrivateNorm
from base.load import Base

from .checkpoint import AdapterCheckpoint


def lower_whole(
    path: str, checkpoint: AdapterCheckpoint, base: Base
) -> PrivateLinear | PrivateEmbedding | PrivateNorm:
    """The module at `path`, in base.dtype; a linear's bias in float32. Raises InvalidAdapter."""
    spec, name, take = base.spec, f"{path}.weight", checkpoint.take
    if path in spec.norms:
        return PrivateNorm(take(name, spec.norms[path]).to(base.dtype))
    if path in spec.embeddings:
        table = spec.embeddings[path]
        return PrivateEmbedding(take(name, table.rows, table.width).to(base.dtype))
    linear = spec.linears[path]
    weight = take(name, linear.out_features, linear.in_features).to(base.dtype)
    bias = take(f"{path}.bias", linear.out_features) if linear.bias else None
    return PrivateLinear(weight, bias)


def lower_saved(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each path in the canonical config's modules_to_save."""
    return {path: lower_whole(path, checkpoint, base) for path in config["modules_to_save"] or ()}
