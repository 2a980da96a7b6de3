"""GraLoRA as a LoRA of rank k r + h: A and B hold the blocks, with zeros between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import low_rank
from .target import Target, targets
from .whole import lower_saved


def lower_gralora(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas = lower_saved(config, checkpoint, base)
    hybrid = config["hybrid_r"]
    scale = config["alpha"] / (config["r"] + hybrid)
    for target in targets(config, checkpoint, base):
        A, B = _blocks(target, config["r"], config["gralora_k"])
        if hybrid:
            A = torch.cat([A, target.take("gralora_A_general.weight", hybrid, target.n)])
            B = torch.cat([B, target.take("gralora_B_general.weight", target.m, hybrid)], dim=1)
        deltas[target.path] = LinearDelta((low_rank(A, B * scale, base),))
    return deltas


def _blocks(target: Target, rank: int, k: int) -> tuple[Tensor, Tensor]:
    """A [k r, n] and B [m, k r].

    Input block i gives r numbers through its own A; of these each output block j takes r / k, and
    the B of j reads what it took from all blocks i. So row (i, j, s) of A lives in block i of the
    input alone, and column (i, j, s) of B in block j of the output.
    """
    across, down, share = target.n // k, target.m // k, rank // k
    blocks_a = target.take("gralora_A", k, across, rank)
    blocks_b = target.take("gralora_B", k, rank, down)
    A = blocks_a.new_zeros(k, rank, k, across)
    B = blocks_b.new_zeros(k, down, k, k, share)
    for block in range(k):
        A[block, :, block] = blocks_a[block].t()
        B[block, :, :, block] = blocks_b[block].t().reshape(down, k, share)
    return A.reshape(k * rank, target.n), B.reshape(target.m, k * rank)
