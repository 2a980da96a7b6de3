"""MiSS as a LoRA: A sums the pieces of x, so it is nothing but ones and zeros; B is the block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.delta import Delta, LinearDelta, LowRank
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import by_columns, factor_dtype
from .shared import shared
from .whole import lower_saved


def lower_miss(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas, rank = lower_saved(config, checkpoint, base), config["r"]
    mini = config["mini_r"] if config["init_weights"] == "mini" else None
    for path in config["target_modules"]:
        shape = base.spec.linears[path]
        checkpoint.take_base_copy(path, base.linear(path).weight)
        block = checkpoint.take(f"{path}.miss_block", rank, mini or shape.out_features)
        if mini:
            block = block.repeat(1, shape.out_features // mini)
        B = by_columns(block.t().to(factor_dtype(base)))
        deltas[path] = LinearDelta((LowRank(_sums(rank, shape.in_features, base), B),))
    return deltas


def _sums(rank: int, width: int, base: Base) -> Tensor:
    """[rank, width]: row i adds up the numbers of x at i, i + rank, i + 2 rank, ...

    All layers of one width and all adapters of one rank hold the same one.
    """
    dtype = factor_dtype(base)

    def make() -> Tensor:
        column = torch.arange(width, device=base.device)
        row = torch.arange(rank, device=base.device)
        return (column % rank == row[:, None]).to(dtype)

    return shared(("miss", rank, width, dtype, str(base.device)), make)
