"""Super-Tuning: a sparse S, whose places the file gives row by row in one number, and a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapters.delta import Delta, LinearDelta, LowRank
from adapters.errors import InvalidAdapter
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import low_rank
from .shira import by_rows
from .target import Target, targets
from .whole import lower_saved


def lower_supertuning(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = {**lower_saved(config, checkpoint, base)}
    for target in targets(config, checkpoint, base):
        entries = int(target.m * target.n * (1 - config["sparsity"]))
        values = target.take("supertuning_values", entries)
        name = f"{target.path}.supertuning_indices"
        flat = checkpoint.take_indices(name, entries)
        if not bool(((flat >= 0) & (flat < target.m * target.n)).all()):
            raise InvalidAdapter(f"points outside of the weight, [{target.m}, {target.n}]", name)
        places = torch.stack([flat // target.n, flat % target.n])
        sparse = by_rows(values, places, target.m)
        deltas[target.path] = LinearDelta(_lora(target, config, base), sparse=sparse)
    return deltas


def _lora(target: Target, config: Mapping[str, Any], base: Base) -> tuple[LowRank, ...]:
    rank = config["r"]
    if not rank:
        return ()
    A = target.take("supertuning_lora_A.weight", rank, target.n)
    B = target.take("supertuning_lora_B.weight", target.m, rank)
    return (low_rank(A, B * (config["lora_alpha"] / rank), base),)
