"""Adapters that are no sum of low ranks, through the engine: its fused decoders step aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.load import load_base
from tests.adapters.lowering.bottleneck_oracle import (
    PARALLEL,
    PFEIFFER,
    BottleneckOracle,
    make_bottleneck,
)
from tests.oracle import make_adapter, make_base, random_tokens
from tests.zoo import Recorder, Zoo, assert_equals_oracle, collect, greedy, specimen, start


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_mixed_batch_equals_each_oracle(architecture: str, tmp_path: Path) -> None:
    source = make_base(tmp_path / "base", architecture)
    base = load_base(source, device="cpu", dtype="float32")
    zoo = Zoo(source, base)
    for kind in ("lora", "oft", "boft", "road", "shira", "dora"):
        zoo.specimens.append(specimen(make_adapter(tmp_path / kind, source, kind), base))
    bottlenecks = {
        name: make_bottleneck(tmp_path / name, source, {**config, "leave_out": [left_out]})
        for name, config, left_out in (("pfeiffer", PFEIFFER, 0), ("parallel", PARALLEL, 9))
    }
    zoo.specimens += [specimen(path, base) for path in bottlenecks.values()]
    engine = start(base, zoo, max_step_tokens=40, max_sequences=16)
    recorder = Recorder(engine)
    try:
        owners = [None, *zoo.specimens, *zoo.specimens[::-1]]
        requests = [
            greedy(str(i), random_tokens(3 + 5 * i, seed=i), owner.ref() if owner else None)
            for i, owner in enumerate(owners)
        ]
        streams = [engine.submit(request) for request in requests]
        for request, stream in zip(requests, streams, strict=True):
            tokens, (end,) = collect(stream)
            assert (end.reason, end.error) == ("length", None)
            name = request.adapter.name if request.adapter else None
            path = bottlenecks.get(name or "")
            oracle = BottleneckOracle(source, path) if path else zoo.oracle(name)
            rows = recorder.rows(request.id)
            assert_equals_oracle(oracle, list(request.prompt), [t.id for t in tokens], rows)
    finally:
        engine.stop()
