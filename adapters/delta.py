"""The operator's data: what one adapter adds to each layer of the base.

For token t with adapter k, at a linear layer with frozen weight W (NF4) and bias b:

    y  =  Q ( g ⊙ ( W R (p ⊙ x)  +  Σ_j  s_j ⊙ ( B_j ( d_j ⊙ (A_j x) ) )  +  S x ) )  +  b_eff

R turns blocks of the input, Q pairs of the output, S is sparse (`adapters/maps.py`). A bottleneck
adapter stands after the layer instead (`Bottleneck`).

Every field that an adapter does not need is None and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch

from adapters.maps import BlockMap, PairMap, Sparse
from base.kernels import NF4Weight, RoundedFactor


@dataclass(frozen=True, slots=True)
class LowRank:
    """One term s ⊙ (B (d ⊙ (A x))); the scale is folded into B, or s for a shared B.

    A and B are both tensors, or both in 8 bits (`adapters.lowering.factors.rounded`).
    """

    A: torch.Tensor | RoundedFactor  # [r, in]
    B: torch.Tensor | RoundedFactor  # [out, r]
    d: torch.Tensor | None = None  # [r]
    s: torch.Tensor | None = None  # [out], scales this term alone (VeRA)

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as tensors; those in 8 bits become float32."""
        A, B = (f.dense() if isinstance(f, RoundedFactor) else f for f in (self.A, self.B))
        return A, B


@dataclass(frozen=True, slots=True)
class LinearDelta:
    """What an unmerged adapter adds to one linear layer."""

    low_rank: tuple[LowRank, ...] = ()
    g: torch.Tensor | None = None  # [out], scales the output rows (DoRA, IA3)
    p: torch.Tensor | None = None  # [in], scales the input (IA3 on feed-forward layers)
    bias: torch.Tensor | None = None  # [out], b_eff in place of the base's own bias; None keeps b
    blocks: tuple[BlockMap, ...] = ()  # R, the first of them is nearest to x (OFT, BOFT)
    sparse: Sparse | None = None  # S (SHiRA)
    pairs: PairMap | None = None  # Q (RoAd)


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """After a layer that writes to the residual stream r:  y' = y + U φ(D z + c) + u + e r.

    z is y (Houlsby et al. 2019, arXiv 1902.00751, figure 2), y + r (Pfeiffer et al. 2020, arXiv
    2005.00247) or r (parallel: He et al. 2021, arXiv 2110.04366). A scale is folded into U and u.
    """

    down: torch.Tensor  # D [d, width]
    down_bias: torch.Tensor  # c [d]
    up: torch.Tensor  # U [width, d]
    up_bias: torch.Tensor  # u [width]
    activation: str  # φ, a key of adapters/activations.py
    reads_output: bool  # y is in z
    reads_stream: bool  # r is in z
    extra: int = 0  # e: the model adds r once by itself
    stream: str | None = None  # path of the norm whose input is r; None where nothing reads r

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


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
class PrivateRows:
    """An adapter's own rows for some tokens, in a table or an output head; the rest is the base's.

    At a table rows(t) = rows[i] for t = ids[i]; at a head logits[t] = rows[i] · x.
    """

    ids: torch.Tensor  # [n] int64, rising
    rows: torch.Tensor  # [n, width]


@dataclass(frozen=True, slots=True)
class Resized:
    """An adapter's own vocabulary, of another number of tokens than the base's V.

    At a table `inner` says what tokens below V become, and row t - V is that of a token t above; at
    a head logits[t] = rows[t - V] · x. Logits of its sequences end after `vocabulary` numbers.
    """

    inner: LinearDelta | PrivateLinear | EmbeddingDelta | PrivateEmbedding | PrivateRows | None
    vocabulary: int
    rows: torch.Tensor  # [vocabulary - V, width]; none where the vocabulary was cut


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


Delta = (
    LinearDelta
    | Bottleneck
    | PrivateLinear
    | EmbeddingDelta
    | PrivateEmbedding
    | PrivateRows
    | Resized
    | PrivateNorm
)


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
    vocabulary: int = 0  # tokens that it knows; 0: the base's

    @property
    def nbytes(self) -> int:
        """Bytes of all distinct tensors: what the adapter costs in a slot."""
        seen = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()
        }
        return sum(seen.values())

    def to(self, device: torch.device) -> LoweredAdapter:
        """The same adapter with its tensors on `device`; no copy where they are there already."""
        return self.mapped(lambda part: part.to(device))

    def mapped(self, each: Callable[[Any], Any]) -> LoweredAdapter:
        """The same adapter with `each` called once on every tensor and every NF4Weight: what
        several layers have in common stays in common."""
        known: dict[int, Any] = {}
        return replace(
            self,
            deltas={path: _mapped(delta, each, known) for path, delta in self.deltas.items()},
            prefix=_mapped(self.prefix, each, known),
        )

    def tensors(self) -> Iterator[torch.Tensor]:
        for delta in self.deltas.values():
            yield from _tensors(delta)
        if self.prefix is not None:
            yield from (self.prefix.keys, self.prefix.values)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a delta, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))


def _mapped(value: Any, each: Callable[[Any], Any], known: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor | NF4Weight):
        if id(value) not in known:
            known[id(value)] = each(value)
        return known[id(value)]
    if isinstance(value, tuple):
        return tuple(_mapped(part, each, known) for part in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    own = {f.name: _mapped(getattr(value, f.name), each, known) for f in fields(value)}
    return replace(value, **own)
