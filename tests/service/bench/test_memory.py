from __future__ import annotations

from base.load import load_base
from service.bench.memory import quantised_bytes, resident
from tests.oracle import make_base


def test_what_was_written_is_resident() -> None:
    before = resident()
    block = bytearray(64 << 20)
    after = resident()
    assert after.rss - before.rss > 60 << 20
    assert after.anonymous - before.anonymous > 60 << 20
    assert after.peak_rss >= after.rss
    del block


def test_nf4_weighs_half_a_byte_and_a_scale_for_each_64(tmp_path) -> None:  # type: ignore[no-untyped-def]
    base = load_base(make_base(tmp_path / "b", "qwen2"), device="cpu")
    weights = sum(
        shape.out_features * shape.in_features
        for shape in base.spec.linears.values()
        if shape.quantized
    )
    assert quantised_bytes(base) == weights // 2 + weights // 64 * 4
