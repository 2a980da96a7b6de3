"""Private weights of methods whose update has full rank: W' by tiles of rows, computed at load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from base.load import Base
from base.nf4 import NF4Linear

from .dora import weight_rows

# (W[start:stop], start, stop) -> W'[start:stop], both float32 [stop - start, in]
Change = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """An adapter's own matrix, still to be computed: `merged.py` keeps it, in the dtype asked for.

    begin  gives the Change; what it holds that is large lives no longer than the tiles
    bias   b_eff [out] float32; None where the layer has none
    """

    linear: NF4Linear | nn.Linear
    begin: Callable[[], Change]
    bias: Tensor | None

    def tiles(self, step: int) -> Iterator[Tensor]:
        """W' in float32, at most `step` rows at a time."""
        change, height = self.begin(), int(self.linear.out_features)
        for start in range(0, height, step):
            stop = min(start + step, height)
            yield change(weight_rows(self.linear, start, stop), start, stop)


def dense(path: str, base: Base, begin: Callable[[], Change], bias: Tensor | None = None) -> Dense:
    """W' at `path`; without `bias`, the base's own."""
    linear = base.linear(path)
    if bias is None and linear.bias is not None:
        bias = linear.bias.detach().float()
    return Dense(linear, begin, bias)


def added(update: Callable[[int, int], Tensor]) -> Change:
    """W + ΔW, where update(start, stop) = ΔW[start:stop]."""
    return lambda tile, start, stop: tile + update(start, stop)


def added_whole(update: Tensor) -> Change:
    """W + ΔW, of a ΔW [out, in] that exists at once."""
    return lambda tile, start, stop: tile + update[start:stop]
