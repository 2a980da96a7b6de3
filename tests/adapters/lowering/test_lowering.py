"""What holds for every kind: the registry, the base's identity, the placement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.delta import LinearDelta, PrivateLinear
from adapters.errors import InvalidAdapter, UnsupportedMedia
from adapters.lowering import FAMILIES, lower
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import make_adapter, read_manifest

Servers = Callable[..., Server]
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def served(server: Servers) -> Server:
    return server("llama")


@pytest.fixture
def adapter(served: Server, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "a", served.directory, rank=3, targets=["q_proj"])


def test_the_kinds_of_the_main_road_have_a_row() -> None:
    assert {"lora", "rslora", "dora"} <= FAMILIES.keys()


def test_identity_kind_and_rank_come_through(served: Server, adapter: Path) -> None:
    manifest = read_manifest(adapter, served.base.spec)
    lowered = lower(manifest, adapter / "adapter_model.safetensors", served.base)
    assert (lowered.digest, lowered.kind, lowered.rank) == (manifest.digest, "lora", 3)
    assert set(lowered.deltas) == set(manifest.targets)


def test_placement_is_the_manifest_s_unless_said_otherwise(served: Server, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    manifest = read_manifest(adapter, served.base.spec, placement="merged", merged_dtype="float32")
    assert isinstance(lower(manifest, weights, served.base).deltas[Q0], PrivateLinear)
    unmerged = lower(manifest, weights, served.base, placement="unmerged")
    assert isinstance(unmerged.deltas[Q0], LinearDelta)
    assert unmerged.notes == {}


def test_an_unknown_kind_is_refused(served: Server, adapter: Path) -> None:
    manifest = read_manifest(adapter, served.base.spec, kind="xlora")
    with pytest.raises(InvalidAdapter, match="kind: kind 'xlora' cannot be served"):
        lower(manifest, adapter / "adapter_model.safetensors", served.base)


def test_an_adapter_for_another_base_is_refused(served: Server, adapter: Path) -> None:
    manifest = read_manifest(adapter, served.base.spec)
    other = dataclasses.replace(manifest, base_fingerprint="f" * 64)
    with pytest.raises(InvalidAdapter, match=r"base_fingerprint: .* made for the base f{64}, this"):
        lower(other, adapter / "adapter_model.safetensors", served.base)


def test_a_file_that_is_no_safetensors_is_refused(served: Server, adapter: Path) -> None:
    manifest = read_manifest(adapter, served.base.spec)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(b"\x80\x04pickle")
    with pytest.raises(UnsupportedMedia, match="too short for safetensors"):
        lower(manifest, weights, served.base)
