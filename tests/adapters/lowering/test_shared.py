"""Tensors in common: in memory once, however many hold them, and gone with the last."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import torch

from adapters.delta import LinearDelta, LoweredAdapter, LowRank
from adapters.lowering import lower
from adapters.lowering.shared import interned
from base.load import Base, load_base
from service.residency.ledger import Ledger, footprint
from tests.oracle import edit_adapter, make_adapter, make_base, read_manifest


def adapter(A: torch.Tensor, B: torch.Tensor) -> LoweredAdapter:
    term = LowRank(A, B)
    return LoweredAdapter("d", "lora", "unmerged", {p: LinearDelta((term,)) for p in "xy"})


def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    A, B = torch.randn(8, 200, generator=chance), torch.randn(8, 300, generator=chance)
    return A, B.t()  # by columns, as the kernels read it


def term(one: LoweredAdapter) -> LowRank:
    delta = one.deltas["x"]
    assert isinstance(delta, LinearDelta)
    return delta.low_rank[0]


def test_equal_tensors_become_one_and_others_stay() -> None:
    first = interned(adapter(*factors(0)))
    A, B = factors(0)
    second = interned(adapter(A, B + 1))
    assert term(second).A is term(first).A
    assert term(second).B is not term(first).B
    assert second.deltas["x"] == second.deltas["y"], "within one adapter it is the same one too"
    torch.testing.assert_close(term(second).B, B + 1, atol=0, rtol=0)
    assert term(interned(adapter(A, B))).B.stride() == B.stride()
    other = interned(adapter(A.reshape(4, 400), B))
    assert term(other).A.shape == (4, 400), "the same bytes in another shape are another tensor"


def test_a_view_is_not_shared_for_what_it_is_cut_from() -> None:
    whole = torch.randn(2000, 8)
    cut = interned(adapter(whole[:1000], whole[1000:]))
    assert term(cut).A.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    again = interned(adapter(whole[:1000].clone(), whole[1000:].clone()))
    assert term(again).A is not term(cut).A


def test_what_nobody_holds_any_more_is_freed() -> None:
    one, other = interned(adapter(*factors(1))), interned(adapter(*factors(1)))
    held = weakref.ref(term(one).A)
    del one
    gc.collect()
    assert held() is not None
    del other
    gc.collect()
    assert held() is None


def test_moving_keeps_in_common_what_was() -> None:
    moved = adapter(*factors(2)).to(torch.device("meta"))
    assert moved.deltas["x"].low_rank[0].A is moved.deltas["y"].low_rank[0].A  # type: ignore


def base(home: Path) -> tuple[Path, Base]:
    source = make_base(home / "base", "qwen3")
    return source, load_base(source, device="cpu", dtype="float32")


def lowered(directory: Path, over: Base) -> LoweredAdapter:
    manifest = read_manifest(directory, over.spec)
    return interned(lower(manifest, directory / "adapter_model.safetensors", over))


def test_adapters_over_one_projection_count_it_once(tmp_path: Path) -> None:
    """Two of VeRA with one seed, and two LoRAs that kept the same A."""
    source, over = base(tmp_path)
    veras = [
        lowered(make_adapter(tmp_path / f"vera{n}", source, "vera", rank=32, seed=n), over)
        for n in range(2)
    ]
    first = make_adapter(tmp_path / "lora0", source, "lora", rank=16, seed=5)
    same_a = make_adapter(tmp_path / "lora1", source, "lora", rank=16, seed=5)
    path = "model.layers.0.mlp.gate_proj"
    B = torch.randn(over.spec.linears[path].out_features, 16)
    edit_adapter(same_a, tensors={f"base_model.model.{path}.lora_B.weight": B})
    loras = [lowered(first, over), lowered(same_a, over)]
    for pair, own in ((veras, 0.2), (loras, 0.2)):
        ledger = Ledger()
        ledger.add(footprint(pair[0]))
        alone = ledger.total
        assert alone == pair[0].nbytes
        extra = ledger.beyond(footprint(pair[1]))
        assert 0 < extra < own * alone
        ledger.add(footprint(pair[1]))
        assert ledger.total == alone + extra
        ledger.remove(footprint(pair[0]))
        assert ledger.total == pair[1].nbytes
        ledger.remove(footprint(pair[1]))
        assert ledger.total == 0


def test_nothing_about_the_adapter_changes() -> None:
    one = replace(adapter(*factors(3)), rank=8, notes={"a": 1.0})
    found = interned(one)
    assert (found.digest, found.kind, found.rank, found.notes) == ("d", "lora", 8, {"a": 1.0})
