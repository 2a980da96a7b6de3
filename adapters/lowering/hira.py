"""HiRA: W' = W ⊙ (1 + B A), of full rank, so it is a private matrix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.delta import Delta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .dense import Change, Dense, dense
from .target import targets
from .whole import lower_saved


def lower_hira(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta | Dense]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta | Dense] = {**lower_saved(config, checkpoint, base)}
    for target in targets(config, checkpoint, base):
        A = target.take("hira_A", config["r"], target.n)
        B = target.take("hira_B", target.m, config["r"])
        deltas[target.path] = dense(target.path, base, partial(_scaled, A, B))
    return deltas


def _scaled(A: Tensor, B: Tensor) -> Change:
    return lambda tile, start, stop: tile + tile * (B[start:stop] @ A)
