"""DeLoRA as a LoRA: λ/r and the norms of A's rows and B's columns are folded into B, ‖W‖ into A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import low_rank
from .target import targets
from .whole import lower_saved

_SMALLEST_NORM = 1e-4  # PEFT's


def lower_delora(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas = lower_saved(config, checkpoint, base)
    for target in targets(config, checkpoint, base):
        rank = config["rank_pattern"].get(target.path, config["r"])
        A = target.take("delora_A", rank, target.n)
        B = target.take("delora_B", target.m, rank)
        norms = A.norm(dim=1).clamp(min=_SMALLEST_NORM) * B.norm(dim=0).clamp(min=_SMALLEST_NORM)
        scale = target.take("delora_lambda", 1) / rank / norms
        # The norms of the weight's columns as they were in training: the file holds them.
        A = A * target.take("delora_w_norm", target.n)
        deltas[target.path] = LinearDelta((low_rank(A, B * scale, base),))
    return deltas
