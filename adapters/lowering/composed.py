"""A sum of lowered adapters: ranks side by side, weights folded in, offsets of biases added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from adapters.delta import Delta, EmbeddingDelta, LinearDelta, LoweredAdapter, LowRank
from adapters.errors import InvalidAdapter
from base.load import Base

from .factors import by_columns, rounded

KIND = "sum"
_ADDED = {"low_rank", "bias"}  # the fields of LinearDelta that add

Weighted = tuple[LoweredAdapter, float]


def compose(digest: str, parts: Sequence[Weighted], base: Base) -> LoweredAdapter:
    """One adapter that adds what its parts add, each times its weight: Σ_i w_i (Δ_i x + δ_i).

    Exact at any ranks, and the same bits whatever comes first is the caller's to see to: the parts
    are added as they stand. Raises InvalidAdapter, naming the module, where one does more than add.
    """
    for adapter, _ in parts:
        if adapter.placement != "unmerged" or adapter.prefix is not None:
            raise InvalidAdapter(f"a {adapter.kind} adapter does more than add to layers", "kind")
    paths = dict.fromkeys(path for adapter, _ in parts for path in adapter.deltas)
    deltas: dict[str, Delta] = {}
    for path in paths:
        here = [(a.deltas[path], weight) for a, weight in parts if path in a.deltas]
        if all(isinstance(delta, EmbeddingDelta) for delta, _ in here):
            deltas[path] = _embedding(path, here)
        else:
            deltas[path] = _linear(path, here, base)
    return LoweredAdapter(
        digest=digest,
        kind=KIND,
        placement="unmerged",
        deltas=rounded(deltas, base),
        rank=max((_rank(delta) for delta in deltas.values()), default=0),
    )


def _linear(path: str, here: Sequence[tuple[Delta, float]], base: Base) -> LinearDelta:
    terms: list[LowRank] = []
    biases: list[tuple[Tensor, float]] = []
    for delta, weight in here:
        if not isinstance(delta, LinearDelta) or _does_more(delta):
            raise InvalidAdapter(f"{path} is not changed by a sum of low-rank terms alone", path)
        terms += [_weighted(term, weight) for term in delta.low_rank]
        if delta.bias is not None:
            biases.append((delta.bias.float(), weight))
    return LinearDelta(low_rank=_side_by_side(terms), bias=_bias(base.linear(path).bias, biases))


def _bias(own: Tensor | None, biases: Sequence[tuple[Tensor, float]]) -> Tensor | None:
    """b + Σ w_i (b_i - b), of biases that stand in place of the base's own b."""
    if not biases:
        return None
    start = torch.zeros_like(biases[0][0]) if own is None else own.detach().float()
    total = start.clone()
    for bias, weight in biases:
        total += weight * (bias - start)
    return total


def _does_more(delta: LinearDelta) -> bool:
    """Whatever field there is beside those that add: one that nobody thought of here as well."""
    others = (getattr(delta, field.name) for field in fields(delta) if field.name not in _ADDED)
    return any(value is not None and value != () for value in others)


def _embedding(path: str, here: Sequence[tuple[Delta, float]]) -> EmbeddingDelta:
    A, B = [], []
    for delta, weight in here:
        assert isinstance(delta, EmbeddingDelta)
        if any(
            getattr(delta, field.name) is not None
            for field in fields(delta)
            if field.name not in ("A", "B")
        ):
            raise InvalidAdapter(f"{path} is not changed by a sum of low-rank terms alone", path)
        A.append(delta.A)
        B.append(delta.B * weight)
    return EmbeddingDelta(by_columns(torch.cat(A)), by_columns(torch.cat(B, dim=1)))


def _weighted(term: LowRank, weight: float) -> LowRank:
    """The term times the weight. Where B is shared with others it stays, and d or s takes it."""
    if term.s is not None:
        return replace(term, s=term.s * weight)
    if term.d is not None:
        return replace(term, d=term.d * weight)
    A, B = term.matrices()
    return LowRank(A, by_columns(B * weight))


def _side_by_side(terms: Sequence[LowRank]) -> tuple[LowRank, ...]:
    """Plain terms as one of all their ranks; those that share their factors stay as they are."""
    plain = [term for term in terms if term.d is None and term.s is None]
    shared = tuple(term for term in terms if term.d is not None or term.s is not None)
    if len(plain) < 2:
        return (*plain, *shared)
    pairs = [term.matrices() for term in plain]
    A = torch.cat([A for A, _ in pairs])
    B = by_columns(torch.cat([B for _, B in pairs], dim=1))
    return (LowRank(A, B), *shared)


def _rank(delta: Delta) -> int:
    if isinstance(delta, LinearDelta):
        return sum(term.rank for term in delta.low_rank)
    return int(delta.A.shape[0]) if isinstance(delta, EmbeddingDelta) else 0
