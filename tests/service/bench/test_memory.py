from __future__ import annotations

import math
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_weighs_half_a_byte_and_a_scale_for_each_64(tmp_path: Path, double_quant: bool) -> None:
    """Four bytes a scale; or one, and for 256 of them four more, a table of 256 and a mean."""
    model = make_base(tmp_path / "b", "qwen2")
    base = load_base(model, device="cpu", double_quant=double_quant)
    sizes = [
        shape.out_features * shape.in_features
        for shape in base.spec.linears.values()
        if shape.quantized
    ]
    scales = [size // 64 + 4 * math.ceil(size / 64 / 256) + 4 * 257 for size in sizes]
    plain = [size // 64 * 4 for size in sizes]
    assert quantised_bytes(base) == sum(sizes) // 2 + sum(scales if double_quant else plain)
