"""An adapter's own matrices, layer by layer: merged placement, W' = Q (g ⊙ (W R p + Σ B d A + S)),
and the methods that have no other form (`dense.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from adapters.delta import (
    Bottleneck,
    Delta,
    EmbeddingDelta,
    LinearDelta,
    PrivateEmbedding,
    PrivateLinear,
)
from adapters.errors import InvalidAdapter
from adapters.manifest import MergedDtype
from base.dense import float_rows
from base.kernels import NF4Weight, PanelWeight
from base.load import Base
from base.nf4 import NF4Linear

from .dense import Dense
from .dora import weight_rows

_TILE_ROWS = 1024  # rows in float32 at a time; a multiple of 64, so that NF4 blocks end with tiles
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@torch.no_grad()
def merge(
    deltas: Mapping[str, Delta | Dense], base: Base, dtype: MergedDtype
) -> tuple[dict[str, Delta], dict[str, float]]:
    """Private matrices in place of deltas, and what keeping them in `dtype` cost.

    "nf4" requantises the layers that the base keeps in NF4, in blocks of 64; a table or an output
    head that the base keeps in float becomes bfloat16. Deltas that change no matrix (a bias, a
    module that is private already) stay. At no time more than one tile of a layer is in float32.
    """
    merged: dict[str, Delta] = {}
    errors = []
    for path, delta in deltas.items():
        if isinstance(delta, Dense) or (isinstance(delta, LinearDelta) and _changes_matrix(delta)):
            quantized = base.spec.linears[path].quantized
            merged[path], error = _merge_linear(delta, base.linear(path), dtype, quantized)
        elif isinstance(delta, Bottleneck):
            reason = "a bottleneck is not linear, so that no matrix holds it; expected 'unmerged'"
            raise InvalidAdapter(reason, "placement")
        elif isinstance(delta, EmbeddingDelta):
            merged[path], error = _merge_embedding(delta, base.embedding(path).weight, dtype)
        else:
            merged[path] = delta
            continue
        errors.append(error)
    if not errors:
        return merged, {}
    return merged, {
        "requantisation_error": max(errors),
        "requantisation_error_mean": sum(errors) / len(errors),
    }


@torch.no_grad()
def keep_dense(deltas: Mapping[str, Delta | Dense], base: Base) -> dict[str, Delta]:
    """Unmerged placement: private matrices, in base.dtype, for what has no other form."""
    return {
        path: _kept(delta, base.dtype)[0] if isinstance(delta, Dense) else delta
        for path, delta in deltas.items()
    }


def _kept(delta: Dense, dtype: torch.dtype) -> tuple[PrivateLinear, float]:
    matrix, error = _rounded(delta.tiles(_TILE_ROWS), dtype)
    return PrivateLinear(matrix, delta.bias), error


def _changes_matrix(delta: LinearDelta) -> bool:
    others = (delta.g, delta.p, delta.sparse, delta.pairs)
    return bool(delta.low_rank or delta.blocks) or any(part is not None for part in others)


def _merge_linear(
    delta: LinearDelta | Dense, linear: NF4Linear | nn.Linear, dtype: MergedDtype, quantized: bool
) -> tuple[PrivateLinear, float]:
    tiles = delta.tiles(_TILE_ROWS) if isinstance(delta, Dense) else _linear_tiles(delta, linear)
    bias = delta.bias
    if bias is None and linear.bias is not None:
        bias = linear.bias.detach().float()
    if dtype == "nf4" and quantized:
        weight, error = _quantized(tiles, (linear.out_features, linear.in_features))
        return PrivateLinear(weight, bias), error
    matrix, error = _rounded(tiles, _DTYPES.get(dtype, torch.bfloat16))
    return PrivateLinear(matrix, bias), error


def _linear_tiles(delta: LinearDelta, linear: NF4Linear | nn.Linear) -> Iterator[Tensor]:
    """The merged weight in float32, [rows of the tile, in] each."""
    for start in range(0, linear.out_features, _TILE_ROWS):
        yield merged_rows(delta, linear, start, min(start + _TILE_ROWS, linear.out_features))


def merged_rows(delta: LinearDelta, linear: NF4Linear | nn.Linear, start: int, stop: int) -> Tensor:
    """The merged weight in float32: [stop - start, in]."""
    pairs = delta.pairs
    if pairs is None:
        return _rows_before_pairs(delta, linear, start, stop)
    group = 2 * pairs.half  # Q mixes the rows of a group
    first, last = start // group * group, -(-stop // group) * group
    tile = _rows_before_pairs(delta, linear, first, last)
    pairs = replace(pairs, own=pairs.own[first:last], other=pairs.other[first:last])
    return pairs(tile.t()).t()[start - first : stop - first].contiguous()


def _rows_before_pairs(
    delta: LinearDelta, linear: NF4Linear | nn.Linear, start: int, stop: int
) -> Tensor:
    """g ⊙ (W R p + Σ B d A + S): [stop - start, in] in float32."""
    tile = weight_rows(linear, start, stop)
    for block_map in reversed(delta.blocks):
        tile = block_map.transposed(tile)
    if delta.p is not None:
        tile = tile * delta.p.float()
    for term in delta.low_rank:
        A, B = term.matrices()
        B = B[start:stop].float()
        own = (B if term.d is None else B * term.d.float()) @ A.float()
        tile = tile + (own if term.s is None else own * term.s[start:stop, None].float())
    if delta.sparse is not None:
        tile = tile + delta.sparse.dense_rows(start, stop, linear.in_features)
    return tile if delta.g is None else tile * delta.g[start:stop, None].float()


def _merge_embedding(
    delta: EmbeddingDelta, table: Tensor | PanelWeight, dtype: MergedDtype
) -> tuple[PrivateEmbedding, float]:
    def tiles() -> Iterator[Tensor]:
        for start in range(0, table.shape[0], _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            stop = min(rows.stop, table.shape[0])
            tile = (
                float_rows(table, start, stop) + delta.A[:, rows].float().t() @ delta.B.float().t()
            )
            yield tile if delta.g is None else tile * delta.g.float()

    weight, error = _rounded(tiles(), _DTYPES.get(dtype, torch.bfloat16))
    return PrivateEmbedding(weight), error


class _Error:
    """‖kept - wanted‖ / ‖wanted‖, summed over tiles."""

    def __init__(self) -> None:
        self.missed = self.total = 0.0

    def add(self, kept: Tensor, wanted: Tensor) -> None:
        self.missed += float((kept.float() - wanted).double().square().sum())
        self.total += float(wanted.double().square().sum())

    @property
    def relative(self) -> float:
        return (self.missed / self.total) ** 0.5 if self.total else 0.0


def _rounded(tiles: Iterator[Tensor], dtype: torch.dtype) -> tuple[Tensor, float]:
    error, kept = _Error(), []
    for tile in tiles:
        kept.append(tile.to(dtype))
        error.add(kept[-1], tile)
    return torch.cat(kept), error.relative


def _quantized(tiles: Iterator[Tensor], shape: tuple[int, int]) -> tuple[NF4Weight, float]:
    error, kept = _Error(), []
    for tile in tiles:
        kept.append(NF4Weight.quantize(tile, double_quant=False))
        error.add(kept[-1].dequantize(torch.float32), tile)
    packed = torch.cat([part.packed for part in kept])
    absmax = torch.cat([part.absmax for part in kept])
    return NF4Weight(packed, absmax, shape), error.relative
