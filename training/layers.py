"""Layers that train: a frozen linear layer of the base with a low-rank delta beside it.

PEFT dispatches on the class of the layer and does not know NF4Linear, so these are ours; what they
save is PEFT's format (`training.checkpoint`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base.nf4 import NF4Linear


class LoraLinear(nn.Module):
    """y = W x + b + s B (A x): "LoRA", arXiv:2106.09685, equation 3. W and b are frozen.

    A [r, in] and B [out, r] are fp32 whatever the base computes in: in bf16 most updates of a
    small learning rate would vanish. B starts at zero, so the first output is the base's own.
    """

    def __init__(self, base: NF4Linear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of the base."""
        y: Tensor = self.base(x)
        return y + self.delta(x).to(y.dtype)

    def delta(self, x: Tensor) -> Tensor:
        """s B (A x), fp32: x [..., in] -> [..., out]."""
        return F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A), self.B) * self.scale


class DoraLinear(LoraLinear):
    """y = m ⊙ (W x + s B A x) / ‖W + s B A‖ + b: "DoRA", arXiv:2402.09353, equation 5.

    The norm, one per output row, is a constant to the gradient (section 4.3 there). It is found
    without dequantising W: n² = ‖W‖² + 2 s Σ (W Aᵀ) ⊙ B + s² Σ (B A Aᵀ) ⊙ B, summed over the rank.
    """

    def __init__(self, base: NF4Linear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scale, dropout)
        self.m = nn.Parameter(base.row_square_norms().sqrt().to(self.A.device))

    def forward(self, x: Tensor) -> Tensor:
        g = self.m / self.row_norms(x.dtype)
        y: Tensor = self.base.matmul(x)
        y = ((y + self.delta(x)) * g).to(y.dtype)
        return y if self.base.bias is None else y + self.base.bias

    @torch.no_grad()
    def row_norms(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """‖W + s B A‖ of each output row: [out], fp32. `dtype` is what the base computes in."""
        A, B, s = self.A, self.B, self.scale
        WA = self.base.matmul(A.to(dtype)).T.float()  # [out, r]
        cross = (WA * B).sum(dim=1)
        square = ((B @ (A @ A.T)) * B).sum(dim=1)
        n2 = self.base.row_square_norms() + 2 * s * cross + s * s * square
        return n2.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
