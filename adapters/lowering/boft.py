"""BOFT: butterfly factors, each a deal of the columns around Cayley transforms; and a gain.

PEFT multiplies x by B_m-1 ... B_1 B_0 with B_i = P_i diag(R_i) P_iᵀ: the last factor comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.delta import Delta, LinearDelta
from adapters.maps import BlockMap
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .oft import cayley
from .shared import shared
from .whole import lower_saved


@torch.no_grad()
def lower_boft(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = lower_saved(config, checkpoint, base)
    factors = config["boft_n_butterfly_factor"]
    for path in config["target_modules"]:
        shape = base.spec.linears[path]
        checkpoint.take_base_copy(path, base.linear(path).weight)
        size = config["boft_block_size"] or shape.in_features // config["boft_block_num"]
        blocks = shape.in_features // size
        R = checkpoint.take(f"{path}.boft_R", factors, blocks, size, size)
        maps = [
            BlockMap(cayley(0.5 * (own - own.mT)), _order(shape.in_features, size, i, base))
            for i, own in enumerate(R)
        ]
        gain = checkpoint.take(f"{path}.boft_s", shape.out_features, 1).flatten()
        deltas[path] = LinearDelta(g=gain, blocks=tuple(reversed(maps)))
    return deltas


def _order(width: int, size: int, factor: int, base: Base) -> Tensor | None:
    """Which column each place of the blocks reads: [width] int32, None where it is its own.

    In each group of size 2^factor columns, cut into pieces of size / 2, the pieces of even number
    stand before those of odd number (`block_butterfly_perm`); P is the inverse of that deal.
    """
    if factor == 0:
        return None

    def make() -> Tensor:
        pieces = torch.arange(width, device=base.device).view(-1, 2**factor, 2, size // 2)
        dealt = pieces.transpose(1, 2).flatten()
        return dealt.argsort().to(torch.int32)

    return shared(("boft", width, size, factor, str(base.device)), make)
