"""The operator: one step's rows, each with its own adapter, through layers that all share.

At a linear layer with frozen weight W (NF4) and bias b, for a token of adapter k:

    y  =  g[k] ⊙ ( W (p[k] ⊙ x)  +  Σ_j  s_j ⊙ ( B_j ( d_j ⊙ (A_j x) ) ) )  +  b_eff[k]

`install` swaps the layers of a model for wrappers. Before each forward pass the engine says which
rows belong to whom (`OperatorContext.segments`); a wrapper looks up its path, and where no adapter
of the step has a delta it is the plain layer. Rows never mix: every product here is by rows, so a
NaN in one adapter stays in its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.delta import (
    Delta,
    EmbeddingDelta,
    LinearDelta,
    LoweredAdapter,
    PrivateEmbedding,
    PrivateLinear,
    PrivateNorm,
)
from base import kernels
from base.kernels import LowRankPlan, NF4Weight
from base.spec import BaseSpec

_KEPT_STEPS = 16  # segmentations whose plans are kept: decode steps come back to the same ones
_FEW_ROWS = 32  # of x, up to which a float matrix on the CPU stands on the left
_TILE_ROWS = 256  # rows of a private matrix that are cast at a time: the cast stays in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Rows [start, stop) of one step use `adapter`; None is the base alone."""

    start: int
    stop: int
    adapter: LoweredAdapter | None


class Segments:
    """The segmentation of one step's rows: adjacent rows of one adapter are one segment.

    Segments must follow each other from row 0 without a gap; empty ones are dropped.
    """

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        merged: list[Segment] = []
        row = 0
        for segment in segments:
            if segment.start != row or segment.stop < segment.start:
                raise ValueError(
                    f"segment [{segment.start}, {segment.stop}) must start at row {row} "
                    "and must not end before it starts"
                )
            row = segment.stop
            if segment.start == segment.stop:
                continue
            if merged and merged[-1].adapter is segment.adapter:
                merged[-1] = Segment(merged[-1].start, segment.stop, segment.adapter)
            else:
                merged.append(segment)
        self._segments = tuple(merged)
        self.rows = row

    @classmethod
    def of(cls, counts: Iterable[tuple[int, LoweredAdapter | None]]) -> Segments:
        """From (number of rows, adapter) pairs in the order of the rows."""
        segments, row = [], 0
        for count, adapter in counts:
            segments.append(Segment(row, row + count, adapter))
            row += count
        return cls(segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def plain(self) -> bool:
        """Does every row use the base alone?"""
        return all(segment.adapter is None for segment in self._segments)

    @property
    def key(self) -> tuple[tuple[int, int], ...]:
        """Equal for two live segmentations exactly when they are the same."""
        return tuple((s.stop, 0 if s.adapter is None else id(s.adapter)) for s in self._segments)


class OperatorContext:
    """What the wrapped layers read: the plan of the step that runs now, by module path.

    The engine sets `segments` (rows of the token tensor) and `logit_segments` (rows that reach
    the output head) before each forward pass; both in one thread. Plans are kept for the last few
    segmentations, so that decode steps of an unchanged batch cost two look-ups. They hold their
    adapters: call `forget` when an adapter leaves its slot.
    """

    def __init__(self) -> None:
        self.layers: dict[str, AdaptedLayer] = {}
        self.head: str | None = None  # path of the output head, whose rows are `logit_segments`
        self.plans: dict[str, Any] = {}  # module path -> plan of the running step
        self._segments = Segments()
        self._logit_segments = Segments()
        self._kept: OrderedDict[Any, tuple[Segments, dict[str, Any]]] = OrderedDict()
        self._terms: dict[int, tuple[LoweredAdapter, dict[str, Any]]] = {}

    @property
    def segments(self) -> Segments:
        return self._segments

    @segments.setter
    def segments(self, segments: Segments) -> None:
        self._segments = segments
        self._select()

    @property
    def logit_segments(self) -> Segments:
        return self._logit_segments

    @logit_segments.setter
    def logit_segments(self, segments: Segments) -> None:
        self._logit_segments = segments
        self._select()

    def forget(self, digest: str) -> None:
        """Drop everything kept for an adapter; it must not be in the running step."""
        held = {key for key, (adapter, _) in self._terms.items() if adapter.digest == digest}
        for key in held:
            del self._terms[key]
        for kept in [k for k in self._kept if held & {owner for _, owner in k[1]}]:
            del self._kept[kept]
        for name in ("_segments", "_logit_segments"):
            if any(s.adapter and s.adapter.digest == digest for s in getattr(self, name)):
                setattr(self, name, Segments())
                self.plans = {}

    def _select(self) -> None:
        plans = self._planned("tokens", self._segments)
        head = self._planned("logits", self._logit_segments)
        self.plans = {**plans, **head} if head else plans

    def _planned(self, which: str, segments: Segments) -> dict[str, Any]:
        if segments.plain:
            return {}
        key = (which, segments.key)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = (segments, self._plan(which, segments))
            if len(self._kept) > _KEPT_STEPS:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return kept[1]

    def _plan(self, which: str, segments: Segments) -> dict[str, Any]:
        parts: dict[str, list[tuple[int, int, Any]]] = {}
        for segment in segments:
            if segment.adapter is None:
                continue
            for path, part in self._prepared(segment.adapter).items():
                if (path == self.head) == (which == "logits"):
                    parts.setdefault(path, []).append((segment.start, segment.stop, part))
        return {path: self.layers[path].plan(found, segments.rows) for path, found in parts.items()}

    def _prepared(self, adapter: LoweredAdapter) -> dict[str, Any]:
        """The adapter's deltas in the form its layers want them, made once."""
        held = self._terms.get(id(adapter))
        if held is None:
            missing = sorted(adapter.deltas.keys() - self.layers.keys())
            if missing:
                raise ValueError(
                    f"adapter {adapter.digest[:12]} has a delta for {missing[0]}, "
                    "which the operator does not wrap"
                )
            prepared = {p: self.layers[p].prepare(delta) for p, delta in adapter.deltas.items()}
            held = self._terms[id(adapter)] = (adapter, prepared)
        return held[1]


class AdaptedLayer(nn.Module):
    """A wrapped layer of the base: `inner` for the rows of no adapter, a plan for the others."""

    def __init__(self, path: str, inner: nn.Module, context: OperatorContext) -> None:
        super().__init__()
        self.path = path
        self.inner = inner
        self.context = context

    @property
    def weight(self) -> Any:
        return self.inner.weight

    def prepare(self, delta: Delta) -> Any:
        """What this layer needs of one adapter, whatever the rows; TypeError for a wrong kind."""
        raise NotImplementedError

    def plan(self, parts: Sequence[tuple[int, int, Any]], rows: int) -> Any:
        """The plan of one step from (start, stop, what `prepare` made), in the order of rows."""
        return parts

    def wrong(self, delta: Delta) -> TypeError:
        return TypeError(f"{self.path} is no place for a {type(delta).__name__}")


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


class AdaptedEmbedding(AdaptedLayer):
    """The embedding table of the base and of a step's adapters: ids [1, T] -> [1, T, width]."""

    def forward(self, ids: Tensor) -> Tensor:
        plan = self.context.plans.get(self.path)
        rows: Tensor = self.inner(ids)
        if plan is None:
            return rows
        flat = ids.reshape(-1)
        y = rows.reshape(-1, rows.shape[-1]).clone()
        # Gemma's table multiplies what it looks up, so what is added must be multiplied alike.
        scale = getattr(self.inner, "embed_scale", None)
        for start, stop, delta in plan:
            own = _embedding_rows(flat[start:stop], delta, self.weight)
            if scale is not None:
                own = own * torch.as_tensor(scale, device=own.device).to(own.dtype)
            y[start:stop] = own.to(y.dtype)
        return y.view(rows.shape)

    def prepare(self, delta: Delta) -> Delta:
        if not isinstance(delta, EmbeddingDelta | PrivateEmbedding):
            raise self.wrong(delta)
        return delta


class AdaptedNorm(AdaptedLayer):
    """A norm of the base, and the adapters' own scales: [1, T, ..., width] to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        plan = self.context.plans.get(self.path)
        y: Tensor = self.inner(x)
        if plan is None:
            return y
        y = y.clone()
        for start, stop, weight in plan:
            own = {"weight": weight}
            y[:, start:stop] = torch.func.functional_call(self.inner, own, (x[:, start:stop],))
        return y

    def prepare(self, delta: Delta) -> Tensor:
        if not isinstance(delta, PrivateNorm):
            raise self.wrong(delta)
        return delta.weight


def install(model: Any, spec: BaseSpec) -> OperatorContext:
    """Wrap the linears, embeddings and norms that `spec` names, in place.

    The output head (`model.get_output_embeddings()`) follows the context's `logit_segments`.
    """
    context = OperatorContext()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    wrappers: tuple[tuple[Iterable[str], type[AdaptedLayer]], ...] = (
        (spec.linears, AdaptedLinear),
        (spec.embeddings, AdaptedEmbedding),
        (spec.norms, AdaptedNorm),
    )
    for paths, wrapper in wrappers:
        for path in paths:
            parent, _, name = path.rpartition(".")
            inner = model.get_submodule(path)
            if isinstance(inner, AdaptedLayer):
                raise ValueError(f"{path} is wrapped already: install once for each model")
            if inner is head:
                context.head = path
            context.layers[path] = wrapper(path, inner, context)
            setattr(model.get_submodule(parent), name, context.layers[path])
    return context


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


def _embedding_rows(ids: Tensor, delta: EmbeddingDelta | PrivateEmbedding, table: Tensor) -> Tensor:
    """[n] -> [n, width], before the table's own scale."""
    if isinstance(delta, PrivateEmbedding):
        return functional.embedding(ids, delta.weight).to(table.dtype)
    own = functional.embedding(ids, table) + (delta.A[:, ids].t() @ delta.B.t()).to(table.dtype)
    return own if delta.g is None else own * delta.g.to(own.dtype)


def _complement(spans: Sequence[tuple[int, int]], rows: int) -> tuple[tuple[int, int], ...]:
    """The spans of [0, rows) between the given ones, which are in order and do not overlap."""
    edges = [0, *(edge for span in spans for edge in span), rows]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, stop) for start, stop in pairs if start < stop)


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float()
