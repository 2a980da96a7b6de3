"""Mixed batches against the oracle: PEFT, one adapter at a time, in fp32, on the same NF4 weights.

32 requests at a time mix no adapter, LoRA of several ranks, rsLoRA and DoRA, merged and unmerged;
their prompts have 1 to 700 tokens, they arrive at random times, and some are cancelled.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from base.load import load_base
from base.mini import MINI
from service.engine.request import Request
from service.engine.stream import Stream
from tests.oracle import ARCHITECTURES, make_base
from tests.zoo import Recorder, Zoo, assert_equals_oracle, collect, greedy, random_prompt, start

LONGEST = 700


def populate(name: str, home: Path) -> Zoo:
    """The zoo of the embedded base or of a tiny random architecture."""
    source = MINI if name == "mini" else make_base(home / "base", name)
    base = load_base(source, device="cpu", dtype="float32")
    return Zoo.populate(source, base, home)


def serve_mixed(zoo: Zoo, rounds: int, seed: int) -> int:
    """Rounds of 32 requests; returns how many outputs were compared."""
    rng = random.Random(seed)
    engine = start(zoo.base, zoo, kv_cache_bytes=3 << 20, max_step_tokens=128, max_sequences=24)
    recorder = Recorder(engine)
    compared = 0
    try:
        for turn in range(rounds):
            recorder.clear()
            running: list[tuple[Request, Stream, bool]] = []
            for number in range(32):
                chosen = rng.choice([None, *zoo.specimens])
                prompt = random_prompt(rng, zoo.base.spec.vocab_size, LONGEST)
                request = greedy(f"{turn}-{number}", prompt, chosen.ref() if chosen else None)
                stream = engine.submit(request)
                cancelled = rng.random() < 0.15
                running.append((request, stream, cancelled))
                time.sleep(rng.choice([0, 0, 0.002, 0.01]))
                if cancelled:
                    stream.cancel()
            for request, stream, cancelled in running:
                tokens, (end,) = collect(stream)
                if end.reason == "cancelled":
                    assert cancelled
                    continue
                assert (end.reason, end.error) == ("length", None)
                rows = recorder.rows(request.id)
                oracle = zoo.oracle(request.adapter.name if request.adapter else None)
                assert_equals_oracle(oracle, list(request.prompt), [t.id for t in tokens], rows)
                compared += 1
            engine.check_integrity()
            assert engine._pool.used == 0
    finally:
        engine.stop()
    return compared


@pytest.mark.parametrize("name", ["mini", *ARCHITECTURES])
def test_mixed_batches_equal_peft(name: str, tmp_path: Path) -> None:
    assert serve_mixed(populate(name, tmp_path), rounds=1, seed=len(name)) >= 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini", *ARCHITECTURES])
def test_two_thousand_mixed_requests_equal_peft(name: str, tmp_path: Path) -> None:
    """Eleven rounds of 32 over six bases: 2,112 requests."""
    assert serve_mixed(populate(name, tmp_path), rounds=11, seed=7) >= 250


def test_the_oracle_can_tell_adapters_apart(tmp_path: Path) -> None:
    """The comparison above is worth something: the wrong adapter's logits are far away."""
    zoo = populate("qwen3", tmp_path)
    prompt = list(range(20))
    names = [None, *(s.manifest.name for s in zoo.specimens if s.manifest.placement == "unmerged")]
    logits = [zoo.oracle(name).logits(prompt)[-1] for name in names]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert float((one - other).abs().max() / one.abs().max()) > 1e-2
    with pytest.raises(AssertionError, match="relative error"):
        assert_equals_oracle(
            zoo.oracle(names[1]), prompt, [int(logits[2].argmax())], {19: logits[2]}
        )
    assert torch.isfinite(logits[0]).all()
