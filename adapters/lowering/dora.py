"""DoRA's norm ‖W + B A‖, without W + B A and without a float copy of W."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from base.dense import float_rows
from base.kernels import PanelWeight
from base.nf4 import NF4Linear

# Below this share of ‖W‖² a row's norm is the small difference of large numbers.
_CANCELLED = 1e-3
_TILE_ROWS = 4096  # rows of a float table that are cast at a time


@torch.no_grad()
def weight_norms(linear: NF4Linear | nn.Linear, A: Tensor, B: Tensor) -> Tensor:
    """‖W + B A‖ by rows, [out] float32; A [r, in] and B [out, r] in float32, scale folded into B.

    With U = W Aᵀ (r rows through the bias-free layer) and w2 = rowsum(W²), which the layer keeps,

        n² = w2 + 2 rowsum(U ⊙ B) + rowsum((B (A Aᵀ)) ⊙ B)

    so an adapter costs one product of r rows. The small sums are taken in float64. Where B A
    cancels most of a row of W, that row is computed as it is written. (DoRA: Liu et al. 2024,
    arXiv 2402.09353, equation 5; the norm of PEFT's DoraLinearLayer.get_weight_norm.)
    """
    if isinstance(linear, NF4Linear):
        U, w2 = linear.matmul(A).t(), linear.row_square_norms().double()
    else:
        U, w2 = _through_float(linear.weight, A)
    a, b = A.double(), B.double()
    squares = w2 + 2 * (U.double() * b).sum(dim=1) + ((b @ (a @ a.t())) * b).sum(dim=1)
    for row in (squares < _CANCELLED * w2).nonzero().flatten().tolist():
        squares[row] = (weight_rows(linear, row, row + 1).double() + b[row] @ a).square().sum()
    return squares.sqrt().float()


@torch.no_grad()
def column_norms(table: Tensor | PanelWeight, A: Tensor, B: Tensor) -> Tensor:
    """‖E + (B A)ᵀ‖ by columns, over the vocabulary: [width] float32.

    table [V, width]; A [r, V] and B [width, r] in float32, scale folded into B. The norm of
    PEFT's DoraEmbeddingLayer, which scales the table's columns and not its rows.
    """
    e2 = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    U = torch.zeros_like(B, dtype=torch.float64)
    for start in range(0, table.shape[0], _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        tile = float_rows(table, start, min(rows.stop, table.shape[0])).double()
        e2 += tile.square().sum(dim=0)
        U += tile.t() @ A[:, rows].double().t()
    a, b = A.double(), B.double()
    return (e2 + 2 * (U * b).sum(dim=1) + ((b @ (a @ a.t())) * b).sum(dim=1)).sqrt().float()


def _through_float(weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """W Aᵀ [out, r] and rowsum(W²) [out] of a float weight, by tiles of rows."""
    U, w2 = [], []
    for start in range(0, weight.shape[0], _TILE_ROWS):
        tile = weight[start : start + _TILE_ROWS].float()
        U.append(tile @ A.t())
        w2.append(tile.double().square().sum(dim=1))
    return torch.cat(U), torch.cat(w2)


def weight_rows(linear: NF4Linear | nn.Linear, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the layer's weight in float32: [stop - start, in]."""
    if isinstance(linear, NF4Linear):
        return linear.weight.dequantize_rows(start, stop, torch.float32)
    return linear.weight[start:stop].detach().float()
