"""The operator at a linear layer: one product for all rows, and what each row's adapter adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.delta import Delta, LinearDelta, PrivateLinear
from base import kernels
from base.kernels import LowRankPlan, NF4Weight

from .layer import AdaptedLayer

_FEW_ROWS = 32  # of x, up to which a float matrix on the CPU stands on the left
_TILE_ROWS = 256  # rows of a private matrix that are cast at a time: the cast stays in the cache


@dataclass(frozen=True, slots=True, eq=False)
class _Terms:
    """One LinearDelta as kernel terms; they run in order, g and bias on the last."""

    low_rank: tuple[kernels.LowRank, ...]
    p: Tensor | None
    alone: tuple[kernels.LowRank, ...] = ()  # with an s of their own, so apart from y and its g


@dataclass(frozen=True, slots=True, eq=False)
class LinearPlan:
    """One step at one linear layer."""

    rows: int
    low_rank: LowRankPlan | None
    scaled: tuple[tuple[int, int, Tensor], ...]  # rows whose x is multiplied by p first
    alone: tuple[tuple[int, int, LowRankPlan], ...]  # terms with a scale of their own
    private: tuple[tuple[int, int, PrivateLinear], ...]
    shared: tuple[tuple[int, int], ...]  # rows that need the base product


class AdaptedLinear(AdaptedLayer):
    """A linear layer of the base and what the adapters of a step add: [1, T, in] -> [1, T, out]."""

    @property
    def bias(self) -> Any:
        return self.inner.bias

    @property
    def in_features(self) -> int:
        return int(self.inner.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        return int(self.inner.out_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        plan = self.context.plans.get(self.path)
        if plan is None:
            return self._base(x)
        flat = x.reshape(-1, x.shape[-1])
        assert flat.shape[0] == plan.rows, f"{self.path}: {flat.shape[0]} rows, plan {plan.rows}"
        y = self._product(flat, plan)
        for start, stop, term in plan.alone:
            own = y.new_zeros(stop - start, y.shape[1])
            kernels.lowrank_add(own, flat[start:stop], term)
            y[start:stop] += own
        if plan.low_rank is not None:
            kernels.lowrank_add(y, flat, plan.low_rank)
        return y.view(*x.shape[:-1], -1)

    def _base(self, x: Tensor) -> Tensor:
        """W x + b of the base alone."""
        few = x.device.type == "cpu" and x.numel() <= _FEW_ROWS * x.shape[-1]
        if few and isinstance(self.inner, nn.Linear):
            return _few_rows(x, self.inner.weight, self.inner.bias)
        return self.inner(x)  # type: ignore[no-any-return]

    def _product(self, x: Tensor, plan: LinearPlan) -> Tensor:
        """W (p ⊙ x) + b, with the private matrix and bias where a row has its own."""
        scaled = x
        if plan.scaled:
            scaled = x.clone()
            for start, stop, p in plan.scaled:
                scaled[start:stop] *= p.to(x.dtype)
        if not plan.private:
            return self._base(scaled)
        y = x.new_empty(x.shape[0], self.out_features)
        if plan.shared:
            # One product for all of them: each call would read the packed weight again.
            part = self._base(torch.cat([scaled[start:stop] for start, stop in plan.shared]))
            counts = [stop - start for start, stop in plan.shared]
            for (start, stop), own in zip(plan.shared, torch.split(part, counts), strict=True):
                y[start:stop] = own
        for start, stop, private in plan.private:
            y[start:stop] = _private_product(x[start:stop], private)
        return y

    def prepare(self, delta: Delta) -> _Terms | PrivateLinear:
        if isinstance(delta, PrivateLinear):
            return delta
        if not isinstance(delta, LinearDelta):
            raise self.wrong(delta)
        terms: list[kernels.LowRank] = []
        alone: list[kernels.LowRank] = []
        for term in delta.low_rank:
            # On zeros a gain scales the term: with it in B, no two layers could share a B.
            own = kernels.LowRank(term.A, term.B, _float(term.d), _float(term.s))
            (terms if term.s is None else alone).append(own)
        bias = self._bias_beyond(delta)
        if delta.g is not None or bias is not None:
            last = terms.pop() if terms else kernels.LowRank()
            terms.append(kernels.LowRank(last.a, last.b, last.d, _float(delta.g), bias))
        return _Terms(tuple(terms), delta.p, tuple(alone))

    def _bias_beyond(self, delta: LinearDelta) -> Tensor | None:
        """What is left to add once the base's b is in y: b_eff - g ⊙ b.

        The shared product adds b to all rows alike; g then scales it with the rest:
        g ⊙ (W x + b + B A x) + (b_eff - g ⊙ b) is the formula above.
        """
        if self.bias is None:
            return _float(delta.bias)
        if delta.g is None and delta.bias is None:
            return None
        base: Tensor = self.bias.detach().float()
        wanted = base if delta.bias is None else delta.bias.float()
        return wanted - (base if delta.g is None else delta.g.float() * base)

    def plan(self, parts: Sequence[tuple[int, int, Any]], rows: int) -> LinearPlan:
        terms = [part for part in parts if isinstance(part[2], _Terms)]
        private = tuple(part for part in parts if isinstance(part[2], PrivateLinear))
        low_rank = [
            kernels.Segment(start, stop, term) for start, stop, t in terms for term in t.low_rank
        ]
        return LinearPlan(
            rows,
            LowRankPlan(low_rank) if low_rank else None,
            tuple((start, stop, t.p) for start, stop, t in terms if t.p is not None),
            tuple(
                (start, stop, LowRankPlan([kernels.Segment(0, stop - start, term)]))
                for start, stop, t in terms
                for term in t.alone
            ),
            private,
            _complement([(start, stop) for start, stop, _ in private], rows) if private else (),
        )


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b of a float matrix as (W xᵀ)ᵀ + b: the CPU's library copies the right-hand side of a
    product into panels first, and an output head is the larger side by far."""
    y = (weight @ x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], weight.shape[0])


def _private_product(x: Tensor, private: PrivateLinear) -> Tensor:
    """x Wᵀ + b with the adapter's own W: x [n, in] -> [n, out]."""
    weight, bias = private.weight, private.bias
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(weight, NF4Weight):
        return kernels.nf4_linear(x, weight, bias)
    if weight.dtype == x.dtype:
        return functional.linear(x, weight, bias)
    # bf16 products are ten times slower than fp32 ones on most CPUs: cast, but only a tile.
    y = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        y[:, rows] = x @ weight[rows].to(x.dtype).t()
    return y if bias is None else y.add_(bias)


def _complement(spans: Sequence[tuple[int, int]], rows: int) -> tuple[tuple[int, int], ...]:
    """The spans of [0, rows) between the given ones, which are in order and do not overlap."""
    edges = [0, *(edge for span in spans for edge in span), rows]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, stop) for start, stop in pairs if start < stop)


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float()
