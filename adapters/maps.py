"""Linear maps that stand around W, and what an adapter does after a layer: data, and y = f(x).

Each keeps to its rows, and gives a row the same bits whether it comes alone or among others, as
far as the libraries below it add in one order for more than a few rows: hence `_at_least`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

_NAIVE_BMM = 400  # torch multiplies matrices of fewer products than this one by one


@dataclass(frozen=True, slots=True)
class Scale:
    """x -> p ⊙ x."""

    p: Tensor  # [width]

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.p.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Shift:
    """x -> x + b."""

    b: Tensor  # [width]

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.b.to(x.dtype)


@dataclass(frozen=True, slots=True)
class BlockMap:
    """x -> x P diag(R_1, ..., R_n) Pᵀ: each block of columns is multiplied by a small matrix.

    OFT (Qiu et al. 2023, arXiv 2306.07280) has one with P = 1. BOFT (Liu et al. 2023, arXiv
    2311.06243, equation 4) has one for each butterfly factor, and P is what deals the columns.
    """

    blocks: Tensor  # [n, size, size] float32; [1, size, size] where all blocks share one
    order: Tensor | None = None  # [width]: place j of the blocks reads and writes column order[j]

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, width] to the same; computed in float32 whatever x is."""
        size = self.blocks.shape[1]
        rows = max(2, _NAIVE_BMM // size**2 + 1)
        z = _at_least(rows, x if self.order is None else x[:, self.order])
        z = z.to(self.blocks.dtype).reshape(len(z), -1, size)
        if len(self.blocks) == 1:
            z = z @ self.blocks[0]
        else:
            z = torch.bmm(z.transpose(0, 1), self.blocks).transpose(0, 1)
        z = z.reshape(len(z), -1)[: len(x)].to(x.dtype)
        if self.order is None:
            return z
        y = torch.empty_like(x)
        y[:, self.order] = z
        return y

    @property
    def transposed(self) -> BlockMap:
        """The map to send the rows of W through, so that the layer is W' x = W R x by itself."""
        return replace(self, blocks=self.blocks.transpose(1, 2))


@dataclass(frozen=True, slots=True)
class PairMap:
    """y -> own ⊙ y + other ⊙ y', where y' swaps the halves of each group of 2 half numbers.

    RoAd: the pair (y_i, y_i+half) is multiplied by a matrix [2, 2] of its own (Liao and Monz 2024,
    arXiv 2409.00119, equation 4). The signs are in `other`.
    """

    own: Tensor  # [out] float32
    other: Tensor  # [out] float32
    half: int

    def __call__(self, y: Tensor) -> Tensor:
        """[..., out] to the same, in float32 whatever y is."""
        groups = y.reshape(*y.shape[:-1], -1, 2, self.half)
        swapped = groups.flip(-2).reshape(y.shape)
        return (self.own * y + self.other * swapped).to(y.dtype)


@dataclass(frozen=True, slots=True)
class Sparse:
    """x -> S x, where S [out, in] has few entries: those of row i are starts[i] to starts[i + 1].

    Entries of one place add up.
    """

    values: Tensor  # [entries] float32
    columns: Tensor  # [entries] int32
    starts: Tensor  # [out + 1] int32

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]: row i of S weighs and adds up rows of xᵀ, a bag of them."""
        table = _at_least(2, x).t().to(self.values.dtype).contiguous()
        y = functional.embedding_bag(
            self.columns,
            table,
            self.starts,
            mode="sum",
            per_sample_weights=self.values,
            include_last_offset=True,
        )
        return y.t()[: len(x)].to(x.dtype)

    def dense_rows(self, start: int, stop: int, width: int) -> Tensor:
        """Rows [start, stop) of S as a matrix [stop - start, width]."""
        first, last = int(self.starts[start]), int(self.starts[stop])
        counts = self.starts[start : stop + 1].diff()
        rows = torch.repeat_interleave(torch.arange(stop - start, device=counts.device), counts)
        tile = self.values.new_zeros(stop - start, width)
        where = (rows, self.columns[first:last].long())
        return tile.index_put_(where, self.values[first:last], accumulate=True)


def _at_least(rows: int, x: Tensor) -> Tensor:
    """x with rows of zeros after its own: products of few rows take another way and round apart."""
    return x if len(x) >= rows else functional.pad(x, (0, 0, 0, rows - len(x)))
