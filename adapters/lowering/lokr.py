"""LoKr: kron(U1 V1, U2 V2) = kron(U1, U2) kron(V1, V2) is a LoRA, where that is the smaller form.

A factor that is whole has the identity on its shorter side. Otherwise a private matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters.checks.lokr import is_lora, sides_of
from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .dense import Change, Dense, added_whole, dense
from .factors import low_rank
from .target import Target, targets
from .whole import lower_saved


def lower_lokr(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta | Dense]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta | Dense] = {**lower_saved(config, checkpoint, base)}
    for target in targets(config, checkpoint, base):
        rank, scale = config["ranks"][target.path], config["scales"][target.path]
        split = config["decompose_both"], config["decompose_factor"]
        first, second = (
            _factors(target, f"lokr_w{which}", height, width, rank if low else 0)
            for which, (height, width, low) in enumerate(
                sides_of(target.m, target.n, rank, *split), start=1
            )
        )
        if is_lora(first[0].shape[1] * second[0].shape[1], target.m, target.n):
            B, A = torch.kron(first[0], second[0]) * scale, torch.kron(first[1], second[1])
            deltas[target.path] = LinearDelta((low_rank(A, B, base),))
        else:
            whole = first[0] @ first[1] * scale, second[0] @ second[1]
            deltas[target.path] = dense(target.path, base, partial(_updated, *whole))
    return deltas


def _factors(
    target: Target, leaf: str, height: int, width: int, rank: int
) -> tuple[Tensor, Tensor]:
    """U [height, r] and V [r, width] of one factor."""
    if rank:
        return target.take(f"{leaf}_a", height, rank), target.take(f"{leaf}_b", rank, width)
    whole = target.take(leaf, height, width)
    one = torch.eye(min(height, width), device=whole.device)
    return (one, whole) if height <= width else (whole, one)


def _updated(first: Tensor, second: Tensor) -> Change:
    return added_whole(torch.kron(first, second))
