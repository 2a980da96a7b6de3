"""The operator at a linear layer: one product for all rows, and what each row's adapter adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.delta import Bottleneck, Delta, LinearDelta, PrivateLinear, PrivateRows, Resized
from adapters.maps import Scale, Shift
from base import kernels
from base.kernels import AdapterTable, LowRankPlan, SlotPlan

from .bottleneck import add_bottleneck
from .layer import AdaptedLayer

Map = Callable[[Tensor], Tensor]  # [n, width] of some rows to what they become
Mapped = tuple[tuple[int, int, Map], ...]  # rows [start, stop), and the map that they go through


@dataclass(frozen=True, slots=True, eq=False)
class _Terms:
    """One LinearDelta as kernel terms and maps; terms run in order, g and bias on the last."""

    low_rank: tuple[kernels.LowRank, ...]
    before: tuple[Map, ...] = ()
    beside: tuple[Map, ...] = ()
    after: tuple[Map, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Wider:
    """An output head of another size: what the base's outputs become, and those beyond."""

    inner: Any  # what `prepare` makes of it; None: the base's own
    rows: Tensor  # [k, in]


@dataclass(frozen=True, slots=True, eq=False)
class LinearPlan:
    """One step at one linear layer."""

    rows: int
    low_rank: LowRankPlan | SlotPlan | None
    before: Mapped  # x goes through these on its way to W alone
    beside: Mapped  # x goes through these, and y gets the sum
    after: Mapped  # y goes through these at last
    private: tuple[tuple[int, int, PrivateLinear], ...]
    shared: tuple[tuple[int, int], ...]  # rows that need the base product
    outputs: tuple[tuple[int, int, PrivateRows], ...] = ()  # some outputs of the adapter's own
    bottlenecks: tuple[tuple[int, int, Bottleneck], ...] = ()
    wider: tuple[tuple[int, int, Tensor], ...] = ()  # outputs beyond the base's


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
        for start, stop, own_rows in plan.outputs:
            y[start:stop, own_rows.ids] = kernels.dense_linear(flat[start:stop], own_rows.rows)
        for start, stop, term in plan.beside:
            y[start:stop] += term(flat[start:stop])
        if plan.low_rank is not None:
            kernels.lowrank_add(y, flat, plan.low_rank)
        for start, stop, term in plan.after:
            y[start:stop] = term(y[start:stop])
        if plan.bottlenecks:
            self._add_bottlenecks(y, plan.bottlenecks)
        if plan.wider:
            y = _widened(y, flat, plan.wider)
        return y.view(*x.shape[:-1], -1)

    def _base(self, x: Tensor) -> Tensor:
        """W x + b of the base alone."""
        if type(self.inner) is nn.Linear:  # the output head
            return kernels.dense_linear(x, self.inner.weight, self.inner.bias)
        return self.inner(x)  # type: ignore[no-any-return]

    def _product(self, x: Tensor, plan: LinearPlan) -> Tensor:
        """W R (p ⊙ x) + b, with the private matrix and bias where a row has its own."""
        mapped = x
        if plan.before:
            mapped = x.clone()
            for start, stop, term in plan.before:
                mapped[start:stop] = term(mapped[start:stop])
        if not plan.private:
            return self._base(mapped)
        y = x.new_empty(x.shape[0], self.out_features)
        if plan.shared:
            # One product for all of them: each call would read the packed weight again.
            part = self._base(torch.cat([mapped[start:stop] for start, stop in plan.shared]))
            counts = [stop - start for start, stop in plan.shared]
            for (start, stop), own in zip(plan.shared, torch.split(part, counts), strict=True):
                y[start:stop] = own
        for start, stop, private in plan.private:
            y[start:stop] = _private_product(x[start:stop], private)
        return y

    def _add_bottlenecks(self, y: Tensor, parts: Sequence[tuple[int, int, Bottleneck]]) -> None:
        streams = {
            path: self.context.inputs.pop(path).reshape(y.shape) for path in _streams_of(parts)
        }
        for start, stop, delta in parts:
            stream = streams[delta.stream][start:stop] if delta.stream else None
            add_bottleneck(y[start:stop], delta, stream)

    def reads(self, plan: LinearPlan) -> Iterable[str]:
        return _streams_of(plan.bottlenecks)

    def prepare(self, delta: Delta) -> Any:
        if isinstance(delta, Resized):
            return _Wider(None if delta.inner is None else self.prepare(delta.inner), delta.rows)
        if isinstance(delta, PrivateLinear | PrivateRows | Bottleneck):
            return delta
        if not isinstance(delta, LinearDelta):
            raise self.wrong(delta)
        terms: list[kernels.LowRank] = []
        beside: list[Map] = [] if delta.sparse is None else [delta.sparse]
        for term in delta.low_rank:
            # On zeros a gain scales the term: with it in B, no two layers could share a B.
            own = kernels.LowRank(term.A, term.B, _float(term.d), _float(term.s))
            if term.s is None:
                terms.append(own)
            else:
                beside.append(_OnZeros(own))
        bias = self._bias_beyond(delta)
        after: tuple[Map, ...] = () if delta.pairs is None else (delta.pairs,)
        if after and bias is not None:  # Q stands between g and the bias
            after, bias = (*after, Shift(bias)), None
        if delta.g is not None or bias is not None:
            last = terms.pop() if terms else kernels.LowRank()
            terms.append(kernels.LowRank(last.a, last.b, last.d, _float(delta.g), bias))
        scale = () if delta.p is None else (Scale(delta.p),)
        return _Terms(tuple(terms), (*scale, *delta.blocks), tuple(beside), after)

    def only_term(self, part: Any) -> kernels.LowRank | None:
        """The one term that a part comes to; None where it is more than that."""
        if not isinstance(part, _Terms) or part.before or part.beside or part.after:
            return None
        term = part.low_rank[0] if part.low_rank else kernels.LowRank()
        return term if len(part.low_rank) <= 1 and self._fits(term) else None

    def put(self, part: Any, table: AdapterTable, place: int) -> bool:
        if not isinstance(part, _Terms) or part.before or part.beside or part.after:
            return False
        # A term that does not fit takes the module's way, which says so: C would not look.
        if not all(self._fits(term) for term in part.low_rank):
            return False
        table.put_terms(place, part.low_rank)
        return True

    def _fits(self, term: kernels.LowRank) -> bool:
        return term.in_features in (None, self.in_features) and term.out_features in (
            None,
            self.out_features,
        )

    def _bias_beyond(self, delta: LinearDelta) -> Tensor | None:
        """What is left to add once the base's b is in y: b_eff - Q (g ⊙ b).

        The shared product adds b to all rows alike; g and Q then take it with the rest:
        Q (g ⊙ (W x + b + B A x)) + (b_eff - Q (g ⊙ b)) is the formula above.
        """
        if self.bias is None:
            return _float(delta.bias)
        if delta.g is None and delta.bias is None and delta.pairs is None:
            return None
        base: Tensor = self.bias.detach().float()
        wanted = base if delta.bias is None else delta.bias.float()
        held = base if delta.g is None else delta.g.float() * base
        beyond = wanted - (held if delta.pairs is None else delta.pairs(held))
        # RoAd turns the bias with the rest, so that nothing is left.
        return beyond if delta.pairs is None or bool(beyond.any()) else None

    def plan(self, parts: Sequence[tuple[int, int, Any]], rows: int) -> LinearPlan:
        wider = [part for part in parts if isinstance(part[2], _Wider)]
        parts = [
            (start, stop, part.inner if isinstance(part, _Wider) else part)
            for start, stop, part in parts
        ]
        terms = [part for part in parts if isinstance(part[2], _Terms)]
        private = tuple(part for part in parts if isinstance(part[2], PrivateLinear))
        low_rank = [
            kernels.Segment(start, stop, term) for start, stop, t in terms for term in t.low_rank
        ]
        return LinearPlan(
            rows,
            LowRankPlan(low_rank) if low_rank else None,
            tuple((start, stop, m) for start, stop, t in terms for m in t.before),
            tuple((start, stop, m) for start, stop, t in terms for m in t.beside),
            tuple((start, stop, m) for start, stop, t in terms for m in t.after),
            private,
            _complement([(start, stop) for start, stop, _ in private], rows) if private else (),
            tuple(part for part in parts if isinstance(part[2], PrivateRows)),
            tuple(part for part in parts if isinstance(part[2], Bottleneck)),
            tuple((start, stop, part.rows) for start, stop, part in wider if len(part.rows)),
        )


class _OnZeros:
    """x -> s ⊙ (B (d ⊙ (A x))): a term with a scale of its own, so apart from y and its g."""

    def __init__(self, term: kernels.LowRank) -> None:
        self.term = term
        self._plan = LowRankPlan([])  # of as many rows as came last: decode steps come back to it

    def __call__(self, x: Tensor) -> Tensor:
        assert self.term.b is not None
        if self._plan.rows != len(x):
            self._plan = LowRankPlan([kernels.Segment(0, len(x), self.term)])
        return kernels.lowrank_add(x.new_zeros(len(x), self.term.b.shape[0]), x, self._plan)


def _streams_of(parts: Iterable[tuple[int, int, Bottleneck]]) -> list[str]:
    """The norms whose inputs these bottlenecks read, each once."""
    return list(dict.fromkeys(delta.stream for _, _, delta in parts if delta.stream))


def _private_product(x: Tensor, private: PrivateLinear) -> Tensor:
    """x Wᵀ + b with the adapter's own W: x [n, in] -> [n, out]."""
    if isinstance(private.weight, Tensor):
        return kernels.dense_linear(x, private.weight, private.bias)
    bias = None if private.bias is None else private.bias.to(x.dtype)
    return kernels.nf4_linear(x, private.weight, bias)


def _widened(y: Tensor, x: Tensor, parts: Sequence[tuple[int, int, Tensor]]) -> Tensor:
    """y [n, out] with the outputs that some rows have beyond the others, which get -inf there."""
    first = y.shape[1]
    wide = y.new_full((len(y), first + max(len(rows) for _, _, rows in parts)), -torch.inf)
    wide[:, :first] = y
    for start, stop, rows in parts:
        wide[start:stop, first : first + len(rows)] = kernels.dense_linear(x[start:stop], rows)
    return wide


def _complement(spans: Sequence[tuple[int, int]], rows: int) -> tuple[tuple[int, int], ...]:
    """The spans of [0, rows) between the given ones, which are in order and do not overlap."""
    edges = [0, *(edge for span in spans for edge in span), rows]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, stop) for start, stop in pairs if start < stop)


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float()
