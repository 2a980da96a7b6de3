"""C3A: W + C / n, where C is made of circulant blocks; of full rank, so it is a private matrix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters.delta import Delta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .dense import Dense, added, dense
from .target import targets
from .whole import lower_saved


def lower_c3a(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta | Dense]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta | Dense] = {**lower_saved(config, checkpoint, base)}
    for target in targets(config, checkpoint, base):
        size = config["block_size_pattern"].get(target.path, config["block_size"])
        kernel = target.take("c3a_kernel", target.m // size, target.n // size, size) / target.n
        deltas[target.path] = dense(target.path, base, partial(added, _Circulant(kernel)))
    return deltas


class _Circulant:
    """Rows of C: number (a, c) of block (i, j) is kernel[i, j, (c - a) mod size]."""

    def __init__(self, kernel: Tensor) -> None:
        self.kernel, self.size = kernel, kernel.shape[2]
        self.columns = torch.arange(self.size, device=kernel.device)

    def __call__(self, start: int, stop: int) -> Tensor:
        rows = torch.arange(start, stop, device=self.kernel.device)
        shift = (self.columns - rows[:, None]) % self.size  # [rows, size]
        blocks = self.kernel[rows // self.size]  # [rows, blocks across, size]
        return blocks.gather(2, shift[:, None].expand_as(blocks)).flatten(1)
