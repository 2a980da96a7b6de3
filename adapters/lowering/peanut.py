"""PEANuT as a LoRA: ΔWᵀ = net(Wᵀ Aᵀ) Bᵀ, so net's output, turned, is the A of a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.activations import ACTIVATIONS
from adapters.delta import Delta, LinearDelta
from base.load import Base
from base.nf4 import NF4Linear

from .checkpoint import AdapterCheckpoint
from .dora import weight_rows
from .factors import low_rank
from .whole import lower_saved

_TILE_ROWS = 1024  # of W, which are in float32 at a time


@torch.no_grad()
def lower_peanut(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = lower_saved(config, checkpoint, base)
    take, rank = checkpoint.take, config["r"]
    activate = ACTIVATIONS[config["act_fn"]]
    for path in config["target_modules"]:
        shape, linear = base.spec.linears[path], base.linear(path)
        checkpoint.take_base_copy(path, linear.weight)
        A = take(f"{path}.peanut_A.weight", rank, shape.out_features)
        B = take(f"{path}.peanut_B.weight", shape.out_features, rank)
        encoders, decoders = (
            [take(f"{path}.peanut_{part}.{i}.weight", rank, rank) for i in range(config["depth"])]
            for part in ("encoders", "decoders")
        )
        hidden = activate(_projected(linear, A))
        kept = []
        for encoder in encoders:
            kept.append(hidden)
            hidden = activate(hidden @ encoder.t())
        for decoder in decoders:
            hidden = activate(hidden @ decoder.t()) + kept.pop()
        deltas[path] = LinearDelta(
            (low_rank(hidden.t().contiguous(), B * config["scaling"], base),)
        )
    return deltas


def _projected(linear: NF4Linear | nn.Linear, A: Tensor) -> Tensor:
    """Wᵀ Aᵀ [in, r] of A [r, out], tile by tile."""
    total = A.new_zeros(linear.in_features, len(A))
    for start in range(0, linear.out_features, _TILE_ROWS):
        stop = min(start + _TILE_ROWS, linear.out_features)
        total += weight_rows(linear, start, stop).t() @ A[:, start:stop].t()
    return total
