"""Uni-LoRA as a LoRA: A and B are filled from one vector, by indices drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import low_rank
from .target import targets
from .whole import lower_saved


def lower_unilora(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = {**lower_saved(config, checkpoint, base)}
    rank, length = config["r"], config["theta_d_length"]
    shapes = {path: base.spec.linears[path] for path in config["order"]}
    total = rank * sum(shape.in_features + shape.out_features for shape in shapes.values())
    indices = _dealt(total, length, config["proj_seed"]).to(base.device)
    # Each number of the vector is used so often, and scaled that its uses add up to itself.
    scales = torch.bincount(indices, minlength=length).float().rsqrt()
    values = (checkpoint.take_shared("unilora_theta_d", length) * scales)[indices]
    places: dict[str, tuple[Tensor, Tensor]] = {}
    start = 0
    for path, shape in shapes.items():
        middle = start + rank * shape.in_features
        stop = middle + rank * shape.out_features
        places[path] = (values[start:middle].view(rank, -1), values[middle:stop].view(-1, rank))
        start = stop
    for target in targets(config, checkpoint, base):
        A, B = places[target.path]
        deltas[target.path] = LinearDelta((low_rank(A.clone(), B, base),))
    return deltas


def _dealt(total: int, length: int, seed: int) -> Tensor:
    """[total] indices below `length`, each about as often, as PEFT's `generate_index` shuffles."""
    generator = np.random.default_rng(seed)
    data = np.repeat(np.arange(length), total // length)
    if rest := total % length:
        data = np.concatenate([data, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(data)
    return torch.from_numpy(data)
