"""Merged placement: the same function as unmerged, up to a rounding that the notes state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters.delta import LinearDelta, LowRank, PrivateEmbedding, PrivateLinear
from adapters.lowering.merged import merge
from adapters.manifest import MergedDtype
from adapters.maps import BlockMap, PairMap, Sparse
from base.kernels import NF4Weight
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import (
    ALL_LINEARS,
    ARCHITECTURES,
    PeftOracle,
    make_adapter,
    random_tokens,
    relative_error,
)

Servers = Callable[..., Server]
EVERYWHERE = (*ALL_LINEARS, "lm_head", "embed_tokens")
KEPT: tuple[MergedDtype, ...] = ("float32", "bfloat16", "nf4")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_in_float32_equals_unmerged(
    architecture: str, kind: str, server: Servers, tmp_path: Path
) -> None:
    served = server(architecture)
    adapter = make_adapter(tmp_path / "a", served.directory, kind, targets=EVERYWHERE)
    unmerged = served.lower(adapter)
    merged = served.lower(adapter, placement="merged", merged_dtype="float32")
    assert (unmerged.placement, merged.placement) == ("unmerged", "merged")
    assert merged.notes["requantisation_error"] == 0
    tokens = random_tokens(20)
    both = served.run([(tokens, unmerged), (tokens, merged)])
    assert relative_error(both[1], both[0]) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("kept", ["bfloat16", "nf4"])
def test_merged_and_rounded_equals_peft_merged_and_rounded(
    kept: MergedDtype, kind: str, server: Servers, tmp_path: Path
) -> None:
    """PEFT merges in float32, then bitsandbytes rounds: the weights agree but for ties.

    A weight on the edge of two roundings may fall either way; one in ten thousand moves the
    logits by about 1e-5.
    """
    served = server("qwen3")
    adapter = make_adapter(tmp_path / "a", served.directory, kind, targets=EVERYWHERE)
    merged = served.lower(adapter, placement="merged", merged_dtype=kept)
    tokens = random_tokens(20)
    got = served.run([(tokens, merged)])[0]
    want = PeftOracle(served.directory, adapter, merged=kept).logits(tokens)
    assert relative_error(got, want) < (1e-4 if kept == "bfloat16" else 1e-3)
    unmerged = served.run([(tokens, served.lower(adapter))])[0]
    assert relative_error(got, unmerged) > 1e-3  # the rounding is there


@pytest.mark.parametrize("kept", KEPT)
def test_the_notes_are_the_error_of_the_weights(
    kept: MergedDtype, server: Servers, tmp_path: Path
) -> None:
    served = server("qwen2")
    adapter = make_adapter(tmp_path / "a", served.directory, "dora", targets=EVERYWHERE)
    unmerged = served.lower(adapter)
    merged = served.lower(adapter, placement="merged", merged_dtype=kept)
    exact = served.lower(adapter, placement="merged", merged_dtype="float32")
    errors = []
    for path in unmerged.deltas:
        weights = []
        for delta in (merged.deltas[path], exact.deltas[path]):
            assert isinstance(delta, PrivateLinear | PrivateEmbedding)
            own = delta.weight
            weights.append(own.dequantize() if isinstance(own, NF4Weight) else own.float())
        errors.append(float((weights[0] - weights[1]).norm() / weights[1].norm()))
    assert merged.notes["requantisation_error"] == pytest.approx(max(errors), rel=1e-3)
    assert merged.notes["requantisation_error_mean"] == pytest.approx(
        sum(errors) / len(errors), rel=1e-3
    )
    bound = {"float32": 0, "bfloat16": 2**-8, "nf4": 0.11}[kept]
    assert max(errors) <= bound


def test_nf4_keeps_the_head_and_the_table_in_bfloat16(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    adapter = make_adapter(tmp_path / "a", served.directory, targets=EVERYWHERE)
    deltas = served.lower(adapter, placement="merged", merged_dtype="nf4").deltas
    head, table = deltas["lm_head"], deltas["model.embed_tokens"]
    inner = deltas["model.layers.0.mlp.up_proj"]
    assert isinstance(head, PrivateLinear)
    assert isinstance(head.weight, torch.Tensor)
    assert isinstance(table, PrivateEmbedding)
    assert head.weight.dtype == table.weight.dtype == torch.bfloat16
    assert isinstance(inner, PrivateLinear)
    assert isinstance(inner.weight, NF4Weight)


@pytest.mark.parametrize("kept", KEPT)
def test_tiles_make_the_same_matrix_as_one_piece(
    kept: MergedDtype, server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field, which no method uses together; a group of pairs is larger than a tile."""
    served, path = server("qwen3"), "model.layers.0.mlp.gate_proj"
    linear = served.base.linear(path)
    out, width = linear.out_features, linear.in_features
    torch.manual_seed(0)
    terms = (
        LowRank(torch.randn(3, width), torch.randn(out, 3), torch.randn(3)),
        LowRank(torch.randn(2, width), torch.randn(out, 2)),
    )
    pairs = PairMap(torch.randn(out), torch.randn(out), out // 4)
    block_maps = (
        BlockMap(torch.randn(1, 16, 16) / 4),
        BlockMap(torch.randn(width // 8, 8, 8) / 3, torch.randperm(width)),
    )
    rows = torch.randint(0, out, (90,)).sort().values
    columns = torch.randint(0, width, (90,), dtype=torch.int32)
    starts = torch.searchsorted(rows, torch.arange(out + 1)).int()
    sparse = Sparse(torch.randn(90), columns, starts)
    delta = LinearDelta(
        terms,
        g=torch.randn(out),
        p=torch.randn(width),
        bias=torch.randn(out),
        blocks=block_maps,
        sparse=sparse,
        pairs=pairs,
    )
    whole = merge({path: delta}, served.base, kept)[0][path]
    monkeypatch.setattr("adapters.lowering.merged._TILE_ROWS", 32)
    tiled = merge({path: delta}, served.base, kept)[0][path]
    assert isinstance(whole, PrivateLinear)
    assert isinstance(tiled, PrivateLinear)
    assert delta.g is not None
    assert delta.p is not None
    # By the columns: what each unit vector becomes.
    x = torch.eye(width)
    mapped = x * delta.p
    for block_map in block_maps:
        mapped = block_map(mapped)
    columns_of = mapped @ linear.weight.dequantize().t() + sparse(x)
    for term in terms:
        columns_of += x @ ((term.B if term.d is None else term.B * term.d) @ term.A).t()
    weight = pairs(columns_of * delta.g).t()
    for private in (whole, tiled):
        own = private.weight
        got = own.dequantize() if isinstance(own, NF4Weight) else own.float()
        bound = {"float32": 1e-6, "bfloat16": 2**-8, "nf4": 0.2}[kept]
        assert relative_error(got, weight) < bound
        assert private.bias is delta.bias
    if isinstance(whole.weight, NF4Weight):
        assert isinstance(tiled.weight, NF4Weight)
        assert torch.equal(whole.weight.packed, tiled.weight.packed)
        assert torch.equal(whole.weight.absmax, tiled.weight.absmax)


def test_what_changes_no_matrix_stays_as_it_is(server: Servers, tmp_path: Path) -> None:
    served = server("qwen3")
    adapter = make_adapter(
        tmp_path / "a",
        served.directory,
        targets=["up_proj"],
        bias="all",
        modules_to_save=["norm", "lm_head"],
    )
    unmerged, merged = served.lower(adapter), served.lower(adapter, placement="merged")
    for path in ("model.layers.0.self_attn.q_proj", "model.norm", "lm_head"):
        assert type(merged.deltas[path]) is type(unmerged.deltas[path])
    tokens = random_tokens(20)
    both = served.run([(tokens, unmerged), (tokens, merged)])
    assert relative_error(both[1], both[0]) < 2e-2
