"""A linear layer whose weight stays in NF4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from base.kernels import Weight, nf4_linear

_TILE_WEIGHTS = 1 << 22  # weights that are dequantised at a time: 16 MiB in float32


class NF4Linear(nn.Module):
    """y = x Wᵀ + b with a frozen W [out, in] in NF4: x [..., in] -> y [..., out].

    Differentiable with respect to x (and to a bias that asks for it); W has no gradient, and
    neither pass keeps a float copy of it. The layout of `weight` decides the precision of the
    forward product (`base.kernels.with_precision`). It is no Parameter: casting the module, as in
    `module.to(torch.bfloat16)`, leaves its scales in float32, and only moves follow.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight: Weight = weight
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
        )
        self._row_square_norms: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return nf4_linear(x, self.weight, self.bias)

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ, without the bias: x [..., in] -> [..., out]."""
        return nf4_linear(x, self.weight, None)

    def row_square_norms(self) -> Tensor:
        """Σ_i W[o, i]² of each output row, [out] float32: the base's part of DoRA's norm.

        Computed once, by tiles of rows, and kept.
        """
        if self._row_square_norms is None:
            self._row_square_norms = _row_square_norms(self.weight)
        return self._row_square_norms

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.weight.device)).device
        if device != self.weight.device:
            self.weight = self.weight.to(device)
            self._row_square_norms = None
        return self


def _row_square_norms(weight: Weight) -> Tensor:
    out, width = weight.shape
    rows = max(1, _TILE_WEIGHTS // width)
    tiles = (weight.dequantize_rows(i, min(i + rows, out)) for i in range(0, out, rows))
    return torch.cat([tile.square().sum(dim=1) for tile in tiles])
