"""Low-rank factors in the dtype and the memory order that the kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.delta import LowRank
from base.load import Base


def low_rank(A: Tensor, B: Tensor, base: Base, d: Tensor | None = None) -> LowRank:
    """The term B (d ⊙ (A x)) of A [r, in], B [out, r] and d [r]; the scale is in B already."""
    dtype = factor_dtype(base)
    return LowRank(A.to(dtype), by_columns(B.to(dtype)), d)


def factor_dtype(base: Base) -> torch.dtype:
    """The kernels read factors in float32 and bfloat16, and add up in float32.

    bfloat16 where the base computes in it, and in the fast precision: a step of few rows reads
    every adapter's factors from memory, and half the bytes are nearly twice as fast. Each factor
    is rounded once, by 2^-9 of itself at most: 0.2 % of what the term adds, where the base's own
    products make 0.8 %.
    """
    half = base.dtype == torch.bfloat16 or base.precision == "fast"
    return torch.bfloat16 if half else torch.float32


def by_columns(matrix: Tensor) -> Tensor:
    """The same matrix with its columns contiguous, in its own memory: what the kernels stream."""
    return matrix.t().contiguous().t()
