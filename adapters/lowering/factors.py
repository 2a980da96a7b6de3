"""Low-rank factors in the dtype and the memory order that the kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from adapters.delta import Delta, LinearDelta, LowRank
from base.kernels import BLOCK, RoundedFactor
from base.load import Base


def low_rank(A: Tensor, B: Tensor, base: Base, d: Tensor | None = None) -> LowRank:
    """The term B (d ⊙ (A x)) of A [r, in], B [out, r] and d [r]; the scale is in B already."""
    dtype = factor_dtype(base)
    return LowRank(A.to(dtype), by_columns(B.to(dtype)), d)


def factor_dtype(base: Base) -> torch.dtype:
    """The kernels read factors in float32 and bfloat16, and add up in float32.

    bfloat16 where the base computes in it, and in the fast precision: a step of few rows reads
    every adapter's factors from memory, and half the bytes are nearly twice as fast. Each factor
    is rounded by 2^-9 of itself at most: 0.2 % of what the term adds, where the base's own
    products make 0.8 %. Plain terms are `rounded` once more.
    """
    half = base.dtype == torch.bfloat16 or base.precision == "fast"
    return torch.bfloat16 if half else torch.float32


def rounded(deltas: Mapping[str, Delta], base: Base) -> dict[str, Delta]:
    """The deltas with their plain terms in 8 bits, where the base serves in the fast precision.

    A step reads every adapter's factors from memory: half the bytes of bfloat16, and the product
    A x is one of bytes. The error is about 1 % of what the term adds (docs/LOG.md). Factors that
    layers share through vectors of their own (VeRA) stay as they are.
    """
    if base.precision != "fast":
        return dict(deltas)
    known: dict[tuple[int, str], RoundedFactor] = {}

    def kept(matrix: Tensor, side: str) -> RoundedFactor:
        make = RoundedFactor.of_a if side == "A" else RoundedFactor.of_b
        if (key := (id(matrix), side)) not in known:
            known[key] = make(matrix)
        return known[key]

    def term_of(term: LowRank) -> LowRank:
        A, B = term.A, term.B
        if isinstance(A, RoundedFactor) or isinstance(B, RoundedFactor):
            return term
        if term.d is not None or term.s is not None or A.shape[1] % BLOCK or not A.shape[0]:
            return term
        return replace(term, A=kept(A, "A"), B=kept(B, "B"))

    return {
        path: replace(delta, low_rank=tuple(map(term_of, delta.low_rank)))
        if isinstance(delta, LinearDelta)
        else delta
        for path, delta in deltas.items()
    }


def by_columns(matrix: Tensor) -> Tensor:
    """The same matrix with its columns contiguous, in its own memory: what the kernels stream."""
    return matrix.t().contiguous().t()
