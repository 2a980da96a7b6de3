"""Layers that train: a frozen linear layer of the base with a low-rank delta beside it.

PEFT dispatches on the class of the layer and does not know NF4Linear, so these are ours; what they
save is PEFT's format (`training.checkpoint`).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base.kernels import NF4Weight, Weight, nf4_backward, nf4_training_product
from base.nf4 import NF4Linear
from training.errors import MethodError
from training.rematerialise import Made, made_of

Init = Literal["zero", "pissa", "olora"]
_CACHED = 1 << 17  # numbers that are added to at a time: 512 KiB


class _Product(torch.autograd.Function):
    """y = g ⊙ (W x + s B (A x)) with g = m / n and a constant n; g = 1 where there is no m.

    One node instead of a dozen: beside the factors only x is kept, or the parts that it is `made`
    of (training/rematerialise.py), and y where there is an m: ∂L/∂m = Σ (∂L/∂y ⊙ y) / m. A x is
    computed again, which costs r columns. g goes into the scales of W's codes and the rows of B,
    so that nothing of y's size is multiplied by it, forward or backward. Where W's scales take none
    (`takes_gain`), or an m is 0 and y does not tell u = y / g, u is multiplied, and kept instead.
    x [T, in], A [r, in], B [out, r], m and n [out].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        m: Tensor | None,
        n: Tensor | None,
        weight: Weight,
        scale: float,
        made: Made | None,
    ) -> Tensor:
        g = None if m is None or n is None else m / n
        ctx.within = g is not None and takes_gain(weight) and not bool((g == 0).any())
        W, gB = (gained(weight, g), B * g[:, None]) if g is not None and ctx.within else (weight, B)
        u = nf4_training_product(x, W)
        if u.dtype is B.dtype:
            u.addmm_(x @ A.t(), gB.t(), alpha=scale)
        else:
            u = u + ((x.to(A.dtype) @ A.t()) @ gB.t()) * scale
        ctx.weight, ctx.scale, ctx.shape = weight, scale, x.shape
        ctx.make = None if made is None else made.make
        y = (u if g is None or ctx.within else u * g).to(x.dtype)
        kept = None if g is None else y if ctx.within else u.to(x.dtype)
        ctx.save_for_backward(A, B, m, n, kept, *((x,) if made is None else made.parts))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        A, B, m, n, kept, *read = ctx.saved_tensors
        x = read[0] if ctx.make is None else ctx.make(*read).view(ctx.shape)
        grad, grad_m, g = grads[0], None, None if m is None else m / n
        W, gB = ctx.weight, B
        if g is not None:
            grad_m = _column_products(grad, kept) / (m if ctx.within else n)
            if ctx.within:
                W, gB = gained(ctx.weight, g), B * g[:, None]
            else:
                grad = (grad * g).to(grad.dtype)
        wide = grad.to(B.dtype)
        inner = (wide @ gB).mul_(ctx.scale)  # [T, r]
        x32 = x.to(A.dtype)
        grad_A = inner.t() @ x32
        grad_B = (wide.t() @ (x32 @ A.t())).mul_(ctx.scale)
        if g is not None and ctx.within:
            grad_B.mul_(g[:, None])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = nf4_backward(grad, W)
            if grad_x.dtype is A.dtype:
                grad_x.addmm_(inner, A)
            else:
                grad_x = (grad_x + inner @ A).to(x.dtype)
        return grad_x, grad_A, grad_B, grad_m, None, None, None, None


def takes_gain(weight: Weight) -> bool:
    """Has each block of codes one row? In panels scales stand between the codes."""
    return isinstance(weight, NF4Weight) and weight.shape[1] % weight.blocksize == 0


def gained(weight: Weight, g: Tensor) -> NF4Weight:
    """diag(g) W of the same codes, for a weight that `takes_gain`."""
    assert isinstance(weight, NF4Weight)
    scales = weight.scales().view(len(g), -1) * g[:, None]
    return NF4Weight(weight.packed, scales.view(-1), weight.shape, weight.blocksize)


def _column_products(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a ⊙ b over the rows, fp32: [T, out] -> [out]. On a CPU some rows at a time, so
    that their sum stays in the cache."""
    rows = len(a) if a.is_cuda else max(1, _CACHED // a.shape[-1])
    total = torch.zeros(min(rows, len(a)), a.shape[-1], device=a.device)
    for piece, other in zip(torch.split(a, rows), torch.split(b, rows), strict=True):
        total[: len(piece)].addcmul_(piece.float(), other.float())
    return total.sum(dim=0)


class LoraLinear(nn.Module):
    """y = W x + b + s B (A x): "LoRA", arXiv:2106.09685, equation 3. W and b are frozen.

    A [r, in] and B [out, r] are fp32 whatever the base computes in: in bf16 most updates of a
    small learning rate would vanish. The first output is the base's own: B starts at zero, or
    `init` starts A and B at main directions of W and their product is taken off again:

        pissa  A = √S Vᵀ, B = U √S / s of the first r singular values: arXiv:2404.02948, eq. 2, 3
        olora  A = R, B = Q / s of the first r columns of W = Q R: arXiv:2406.01775, section 3

    Both papers put W - s B A in the place of W. Quantised again, that would be another base, so
    the product is subtracted here, and the adapter that is saved has twice the rank.
    """

    def __init__(
        self,
        base: NF4Linear,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        init: Init = "zero",
    ) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.start: tuple[Tensor, Tensor] | None = None
        if init == "zero":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        else:
            self._start_at(*_directions(base, rank, scale, init))

    @torch.no_grad()
    def _start_at(self, A: Tensor, B: Tensor) -> None:
        self.A.copy_(A)
        self.B.copy_(B)
        self.start = (A, B)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of the base."""
        if self._drops:
            y: Tensor = self.base(x)
            return y + self.delta(x).to(y.dtype)
        return self._whole(x)

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout.p > 0

    def _whole(self, x: Tensor, m: Tensor | None = None, n: Tensor | None = None) -> Tensor:
        A, B = self.factors()
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = _Product.apply(rows, A, B, m, n, self.base.weight, self.scale, made_of(x))  # type: ignore[no-untyped-call]
        y = y if self.base.bias is None else y + self.base.bias
        return y.view(*x.shape[:-1], y.shape[-1])

    def delta(self, x: Tensor) -> Tensor:
        """s B (A x), fp32: x [..., in] -> [..., out]."""
        A, B = self.factors()
        return F.linear(F.linear(self.dropout(x.to(A.dtype)), A), B) * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the whole change: B A, less the B A that it started at."""
        if self.start is None:
            return self.A, self.B
        A, B = self.start
        return torch.cat([self.A, A]), torch.cat([self.B, -B], dim=1)

    @torch.no_grad()
    def saved(self, attribute: str, factor: float = 1.0) -> Tensor:
        """What a checkpoint holds under `attribute`; `factor` is what B is multiplied by."""
        if self.start is None or attribute not in ("A", "B"):
            tensor: Tensor = getattr(self, attribute).detach()
            return tensor
        A, B = self.factors()
        return A if attribute == "A" else B * factor


class DoraLinear(LoraLinear):
    """y = m ⊙ (W x + s B A x) / ‖W + s B A‖ + b: "DoRA", arXiv:2402.09353, equation 5.

    The norm, one per output row, is a constant to the gradient (section 4.3 there). It is found
    without dequantising W: n² = ‖W‖² + 2 s Σ (W Aᵀ) ⊙ B + s² Σ (B A Aᵀ) ⊙ B, summed over the rank.
    """

    def __init__(
        self,
        base: NF4Linear,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        init: Init = "zero",
    ) -> None:
        super().__init__(base, rank, scale, dropout, init)
        self.m = nn.Parameter(base.row_square_norms().sqrt().to(self.A.device))

    def forward(self, x: Tensor) -> Tensor:
        n = self.row_norms(x.dtype)
        if not self._drops:
            return self._whole(x, self.m, n)
        g = self.m / n
        y: Tensor = self.base.matmul(x)
        y = ((y + self.delta(x)) * g).to(y.dtype)
        return y if self.base.bias is None else y + self.base.bias

    @torch.no_grad()
    def row_norms(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """‖W + s B A‖ of each output row: [out], fp32. `dtype` is what the base computes in."""
        (A, B), s = self.factors(), self.scale
        WA = self.base.matmul(A.to(dtype)).T.float()  # [out, r]
        cross = (WA * B).sum(dim=1)
        square = ((B @ (A @ A.T)) * B).sum(dim=1)
        n2 = self.base.row_square_norms() + 2 * s * cross + s * s * square
        return n2.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


@torch.no_grad()
def _directions(base: NF4Linear, rank: int, scale: float, init: Init) -> tuple[Tensor, Tensor]:
    W = base.weight.dequantize(torch.float32)
    if rank > min(W.shape):
        raise MethodError(f"method.rank {rank} is over {min(W.shape)}, the rank of a {init} target")
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:rank].contiguous(), Q[:, :rank] / scale
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root / scale
