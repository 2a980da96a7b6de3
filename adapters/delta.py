"""The operator's data: what one adapter adds to each layer of the base.

For token t with adapter k, at a linear layer with frozen weight W (NF4) and bias b:

    y  =  g ⊙ ( W (p ⊙ x)  +  Σ_j  s_j ⊙ ( B_j ( d_j ⊙ (A_j x) ) ) )  +  b_eff

Every field that an adapter does not need is None and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from base.kernels import NF4Weight


@dataclass(frozen=True, slots=True)
class LowRank:
    """One term s ⊙ (B (d ⊙ (A x))); the scale is folded into B, or s for a shared B."""

    A: torch.Tensor  # [r, in]
    B: torch.Tensor  # [out, r]
    d: torch.Tensor | None = None  # [r]
    s: torch.Tensor | None = None  # [out], scales this term alone (VeRA)

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


@dataclass(frozen=True, slots=True)
class LinearDelta:
    """What an unmerged adapter adds to one linear layer."""

    low_rank: tuple[LowRank, ...] = ()
    g: torch.Tensor | None = None  # [out], scales the output rows (DoRA, IA3)
    p: torch.Tensor | None = None  # [in], scales the input (IA3 on feed-forward layers)
    bias: torch.Tensor | None = None  # [out], b_eff in place of the base's own bias; None keeps b


@dataclass(frozen=True, slots=True)
class PrivateLinear:
    """An adapter's own matrix for one linear layer: merged placement, or modules_to_save."""

    weight: torch.Tensor | NF4Weight  # [out, in]
    bias: torch.Tensor | None = None  # [out]


@dataclass(frozen=True, slots=True)
class EmbeddingDelta:
    """rows(ids) = g ⊙ (E[ids] + A[:, ids]ᵀ Bᵀ); the scale is folded into B."""

    A: torch.Tensor  # [r, vocabulary]
    B: torch.Tensor  # [width, r]
    g: torch.Tensor | None = None  # [width]


@dataclass(frozen=True, slots=True)
class PrivateEmbedding:
    """An adapter's own embedding table: merged placement, or modules_to_save."""

    weight: torch.Tensor  # [vocabulary, width]


@dataclass(frozen=True, slots=True)
class PrivateNorm:
    """An adapter's own norm scale: modules_to_save on a norm layer."""

    weight: torch.Tensor  # [width]


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of an adapter's n virtual tokens, as the KV cache holds them.

    They stand at positions 0 to n - 1; the rotary embedding is not applied to them again.
    """

    keys: torch.Tensor  # [layers, n, kv_heads, head_dim]
    values: torch.Tensor  # [layers, n, kv_heads, head_dim]

    @property
    def tokens(self) -> int:
        return int(self.keys.shape[1])


Delta = LinearDelta | PrivateLinear | EmbeddingDelta | PrivateEmbedding | PrivateNorm


@dataclass(frozen=True, slots=True)
class LoweredAdapter:
    """One adapter, ready for the operator: a delta for each module path that it touches, and the
    virtual tokens that stand before every sequence of it."""

    digest: str
    kind: str  # "lora", "dora", ...
    placement: str  # "unmerged" | "merged"
    deltas: Mapping[str, Delta]
    rank: int = 0
    notes: Mapping[str, float] = field(default_factory=dict)  # e.g. {"requantisation_error": …}
    prefix: Prefix | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all distinct tensors: what the adapter costs in a slot."""
        seen = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()
        }
        return sum(seen.values())

    def to(self, device: torch.device) -> LoweredAdapter:
        """The same adapter with its tensors on `device`; no copy where they are there already."""
        return replace(
            self,
            deltas={path: _moved(d, device) for path, d in self.deltas.items()},
            prefix=_moved(self.prefix, device),
        )

    def tensors(self) -> Iterator[torch.Tensor]:
        for delta in self.deltas.values():
            yield from _tensors(delta)
        if self.prefix is not None:
            yield from (self.prefix.keys, self.prefix.values)


def _tensors(delta: Delta) -> Iterator[torch.Tensor]:
    if isinstance(delta, LinearDelta):
        for term in delta.low_rank:
            yield from (t for t in (term.A, term.B, term.d, term.s) if t is not None)
        yield from (t for t in (delta.g, delta.p, delta.bias) if t is not None)
    elif isinstance(delta, PrivateLinear):
        weight = delta.weight
        yield from (weight.packed, weight.absmax) if isinstance(weight, NF4Weight) else (weight,)
        if delta.bias is not None:
            yield delta.bias
    elif isinstance(delta, EmbeddingDelta):
        yield from (t for t in (delta.A, delta.B, delta.g) if t is not None)
    else:
        yield delta.weight


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor | NF4Weight):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(v, device) for v in value)
    if value is None:
        return None
    return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
