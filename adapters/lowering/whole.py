"""modules_to_save: modules that an adapter replaces whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapters.delta import (
    Delta,
    LinearDelta,
    PrivateEmbedding,
    PrivateLinear,
    PrivateNorm,
    PrivateRows,
)
from base.dense import RoundedLinear, holds
from base.load import Base

from .checkpoint import AdapterCheckpoint


def lower_whole(path: str, checkpoint: AdapterCheckpoint, base: Base) -> Delta:
    """The module at `path`, in base.dtype; a linear's bias in float32. Raises InvalidAdapter.

    A table or head that is the base's own, to the bit, costs nothing and shares the base's
    product: PEFT saves them with adapters that never touched them (`save_embedding_layers`).
    """
    spec, name, take = base.spec, f"{path}.weight", checkpoint.take
    if path in spec.norms:
        return PrivateNorm(take(name, spec.norms[path]).to(base.dtype))
    if path in spec.embeddings:
        table = spec.embeddings[path]
        weight = take(name, table.rows, table.width).to(base.dtype)
        if holds(base.embedding(path).weight, weight):
            none = torch.empty(0, dtype=torch.int64, device=base.device)
            return PrivateRows(none, weight[:0].clone())
        return PrivateEmbedding(weight)
    linear = spec.linears[path]
    weight = take(name, linear.out_features, linear.in_features).to(base.dtype)
    bias = take(f"{path}.bias", linear.out_features) if linear.bias else None
    head = base.linear(path)
    own: Any = head.weight
    in_float = isinstance(own, torch.Tensor) or isinstance(head, RoundedLinear)
    if bias is None and in_float and holds(own, weight):
        return LinearDelta()
    return PrivateLinear(weight, bias)


def lower_saved(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each path in the canonical config's modules_to_save."""
    return {path: lower_whole(path, checkpoint, base) for path in config["modules_to_save"] or ()}
