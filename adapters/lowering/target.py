"""The linear layers that a method adapts, each with its tensors in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from base.load import Base
from base.nf4 import NF4Linear

from .checkpoint import AdapterCheckpoint
from .dora import weight_rows

_TILE_ROWS = 4096  # rows of a float weight that are cast at a time


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One linear layer W [m, n] with an adapter on it."""

    path: str
    linear: NF4Linear | nn.Linear
    checkpoint: AdapterCheckpoint

    @property
    def m(self) -> int:
        return int(self.linear.out_features)

    @property
    def n(self) -> int:
        return int(self.linear.in_features)

    def take(self, leaf: str, *shape: int) -> Tensor:
        """The tensor of this layer in float32. Raises InvalidAdapter."""
        return self.checkpoint.take(f"{self.path}.{leaf}", *shape)

    @torch.no_grad()
    def times(self, columns: Tensor) -> Tensor:
        """W P [m, k] of P [n, k], without the bias."""
        if isinstance(self.linear, NF4Linear):
            return self.linear.matmul(columns.t().contiguous()).t()
        return torch.cat([tile @ columns for _, _, tile in self._tiles()])

    @torch.no_grad()
    def times_left(self, columns: Tensor) -> Tensor:
        """Pᵀ W [k, n] of P [m, k]."""
        total = columns.new_zeros(columns.shape[1], self.n)
        for start, stop, tile in self._tiles():
            total += columns[start:stop].t() @ tile
        return total

    def _tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        for start in range(0, self.m, _TILE_ROWS):
            stop = min(start + _TILE_ROWS, self.m)
            yield start, stop, weight_rows(self.linear, start, stop)


def targets(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> Iterator[Target]:
    """The canonical config's targets, in its order. Raises InvalidAdapter for a foreign table."""
    for path in config["target_modules"]:
        target = Target(path, base.linear(path), checkpoint)
        checkpoint.take_base_copy(path, target.linear.weight)
        yield target
