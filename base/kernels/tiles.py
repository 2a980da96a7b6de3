"""Products over NF4 for training: W is made floats a tile of rows at a time, and torch multiplies.

With hundreds of rows of x what the floats cost is little beside the product, and torch's own
product is as fast as the machine. A tile stays in the cache; there is never a full copy of W.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .native import Native, Weight
from .panels import PanelWeight

TILE_WEIGHTS = 1 << 20  # 4 MiB of floats
MANY_ROWS = 512  # of x, from which on torch's product makes up for its tiles


def multiply(native: Native, x: Tensor, weight: Weight) -> Tensor:
    """x Wᵀ, float32 on the CPU: x [..., in] -> [..., out]."""
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(*x.shape[:-1], weight.shape[0])  # what is returned is no view: PEFT adds to it
    flat = y.view(len(rows), weight.shape[0])
    for start, stop, tile in _tiles(native, weight):
        torch.mm(rows, tile.t(), out=flat[:, start:stop])
    return y


def backward(native: Native, grad_y: Tensor, weight: Weight) -> Tensor:
    """∂L/∂x = ∂L/∂y W, float32 on the CPU: grad_y [..., out] -> [..., in]."""
    rows = grad_y.reshape(-1, grad_y.shape[-1])
    grad_x = rows.new_zeros(len(rows), weight.shape[1])
    for start, stop, tile in _tiles(native, weight):
        grad_x.addmm_(rows[:, start:stop], tile)
    return grad_x.view(*grad_y.shape[:-1], weight.shape[1])


def takes(weight: Weight) -> bool:
    """Can the C library make floats of this weight's rows?"""
    return weight.on_cpu and not (isinstance(weight, PanelWeight) and weight.bits != 4)


def _tiles(native: Native, weight: Weight) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, rows [start, stop) of W): each tile in the memory of the one before."""
    out, width = weight.shape
    count = max(1, TILE_WEIGHTS // max(1, width))
    memory = torch.empty(min(count, out), width)
    for start in range(0, out, count):
        stop = min(start + count, out)
        yield start, stop, native.rows(weight, start, stop, memory[: stop - start])
