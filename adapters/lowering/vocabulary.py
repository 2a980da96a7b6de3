"""Adapters whose vocabulary was resized: lowered over a base of their size, then cut to the base's.

A family sees tables [rows, width] with the file's new rows below the base's own. What comes of it
is divided in two (`Resized`): a delta for the base's rows, as of any adapter, and the new rows as
they stand, with everything that the adapter adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.checks.saved_tables import DOUBLES, TABLE_LEAVES
from adapters.delta import (
    Delta,
    EmbeddingDelta,
    LinearDelta,
    LowRank,
    PrivateEmbedding,
    PrivateLinear,
    PrivateRows,
    Resized,
)
from adapters.errors import InvalidAdapter
from adapters.vocabulary import resized, table_shapes
from base.dense import float_rows, holds, is_copy
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .merged import merged_rows


@dataclass(frozen=True, eq=False)
class ResizedBase:
    """A base as `resize_token_embeddings` left it, for the families: all else is the base's."""

    base: Base
    spec: Any
    tables: Mapping[str, nn.Embedding | nn.Linear]

    def linear(self, path: str) -> Any:
        return self.tables.get(path) or self.base.linear(path)

    def embedding(self, path: str) -> Any:
        return self.tables.get(path) or self.base.embedding(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)


def resized_base(base: Base, rows: int, checkpoint: AdapterCheckpoint) -> Any:
    """The base with tables of `rows` rows, the new ones as the file has them. In place of a Base.

    Raises InvalidAdapter where the file lacks them.
    """
    shapes = table_shapes(base.spec)
    tied = next((p for p in shapes if _leaf_of(p, checkpoint)), None)
    tables: dict[str, nn.Embedding | nn.Linear] = {}
    for path in shapes:
        source = path if _leaf_of(path, checkpoint) or not base.spec.tied_embeddings else tied
        tables[path] = _table(path, _whole(path, source, rows, checkpoint, base), base)
    return ResizedBase(base, resized(base.spec, rows), tables)


def leave_doubles(checkpoint: AdapterCheckpoint, base: Base) -> None:
    """What PEFT saves twice of a table in modules_to_save; the checks have compared it."""
    for path in table_shapes(base.spec):
        if checkpoint.has(f"{path}.weight"):
            checkpoint.leave(*(f"{path}.{leaf}" for leaf in DOUBLES))


def _leaf_of(path: str, checkpoint: AdapterCheckpoint) -> str | None:
    """The tensor that holds a table as the training found it, if the file has it."""
    return next((leaf for leaf in TABLE_LEAVES if checkpoint.has(f"{path}.{leaf}")), None)


def _whole(
    path: str, source: str | None, rows: int, checkpoint: AdapterCheckpoint, base: Base
) -> Tensor:
    """The table [rows, width] before the adapter changes it: the base's, and the file's new rows.

    `source` is the path whose rows the file has: the table's, for a head that is tied to it.
    """
    module = base.embedding(path) if path in base.spec.embeddings else base.linear(path)
    weight: Any = module.weight
    own, leaf = weight.shape[0], _leaf_of(source or path, checkpoint)
    if rows > own and leaf is None:
        raise InvalidAdapter(f"is missing, with the new rows of {path}", f"{path}.weight")
    if isinstance(weight, Tensor):
        kept = weight.detach()[:rows]
        if rows <= own:
            return kept
        new = checkpoint.peek(f"{source}.{leaf}", own, rows)
        # Not in the dtype that the base is stored in: the new rows were never rounded to that.
        return torch.cat([kept.to(base.dtype), new.to(base.dtype)])
    # In 8 bits: the file's own floats, where those are what the bits were made of.
    if leaf is not None:
        whole = checkpoint.peek(f"{source}.{leaf}", 0, rows)
        first = whole[:own]
        if len(first) == own and (holds if leaf == "weight" else _is_copy)(weight, first):
            return whole
    kept = float_rows(weight, 0, min(own, rows))
    return kept if rows <= own else torch.cat([kept, whole[own:]])


def _is_copy(weight: Any, other: Tensor) -> bool:
    return is_copy(other, weight)


def _table(path: str, weight: Tensor, base: Base) -> nn.Embedding | nn.Linear:
    rows, width = weight.shape
    with torch.device("meta"):
        made: nn.Embedding | nn.Linear
        if path in base.spec.embeddings:
            made = nn.Embedding(rows, width)
        else:
            if base.linear(path).bias is not None:
                raise InvalidAdapter(f"{path} has a bias, whose new numbers no file holds", path)
            made = nn.Linear(width, rows, bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


@torch.no_grad()
def divided(deltas: Mapping[str, Delta], base: Base, wide: Any) -> dict[str, Delta]:
    """The deltas over `wide` (of `resized_base`) as deltas over the base. Raises InvalidAdapter."""
    found = dict(deltas)
    for path, (own, _) in table_shapes(base.spec).items():
        table = wide.embedding(path) if path in base.spec.embeddings else wide.linear(path)
        found[path] = _divided(path, found.get(path), own, table, base)
    return found


def _divided(path: str, delta: Delta | None, own: int, table: Any, base: Base) -> Delta:
    rows = len(table.weight)
    last = table.weight[own:]  # none where the vocabulary was cut
    inner: LinearDelta | PrivateLinear | EmbeddingDelta | PrivateEmbedding | PrivateRows | None
    if isinstance(delta, PrivateEmbedding | PrivateLinear):
        assert isinstance(delta.weight, Tensor), "heads are never kept in NF4"
        inner, last = replace(delta, weight=_fitted(delta.weight, own)), delta.weight[own:]
    elif isinstance(delta, PrivateRows):
        inner, last = _divided_rows(delta, own, last)
    elif isinstance(delta, EmbeddingDelta):
        last = last.float() + delta.A[:, own:].float().t() @ delta.B.float().t()
        last = last if delta.g is None else last * delta.g.float()
        inner = replace(delta, A=_fitted(delta.A.t(), own).t().contiguous())
    elif isinstance(delta, LinearDelta):
        if rows > own:
            last = merged_rows(delta, table, own, rows)
        inner = _narrow_linear(path, delta, own)
    else:
        inner = None
    return Resized(inner, rows, last.to(base.dtype).clone())


def _divided_rows(delta: PrivateRows, own: int, last: Tensor) -> tuple[PrivateRows | None, Tensor]:
    here = delta.ids < own
    last = last.to(delta.rows.dtype, copy=True)
    last[delta.ids[~here] - own] = delta.rows[~here]
    inner = PrivateRows(delta.ids[here], delta.rows[here]) if bool(here.any()) else None
    return inner, last


def _narrow_linear(path: str, delta: LinearDelta, own: int) -> LinearDelta | None:
    if delta.sparse is not None or delta.pairs is not None or delta.bias is not None:
        raise InvalidAdapter(
            "the vocabulary was resized, and what this method does to the output head has no "
            "parts by token; serve it merged (placement=merged)",
            path,
        )
    terms = tuple(
        LowRank(t.A, _fitted(t.matrices()[1], own), t.d, None if t.s is None else _fitted(t.s, own))
        for t in delta.low_rank
    )
    g = None if delta.g is None else _fitted(delta.g, own)
    if not terms and g is None and delta.p is None and not delta.blocks:
        return None
    return replace(delta, low_rank=terms, g=g)


def _fitted(tensor: Tensor, rows: int) -> Tensor:
    """The first `rows` rows; zeros for those that a cut vocabulary has not, which nobody reads."""
    lacking = rows - len(tensor)
    if lacking <= 0:
        return tensor[:rows].clone()
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, lacking))
