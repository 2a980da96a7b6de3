"""The bench's arms see the same tokens, start alike, and learn the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from base import random_model
from training.bench import rounds
from training.bench.arm import Turn
from training.bench.stream import Shape, batches, unpacked
from training.data.batches import IGNORED

SHAPE = Shape(rows=2, length=64)


def test_every_process_draws_the_same_and_padding_changes_no_token() -> None:
    first, again = batches(SHAPE, 3, 500), batches(SHAPE, 3, 500)
    for packed, other in zip(first, again, strict=True):
        assert packed.input_ids.equal(other.input_ids)
        assert packed.position_ids is not None
        plain = unpacked(packed)
        assert plain.position_ids is None
        for batch in (packed, plain):
            kept = batch.input_ids[batch.attention_mask.bool()]
            assert sorted(kept) == sorted(packed.input_ids[packed.attention_mask.bool()])
        assert plain.loss_tokens == packed.loss_tokens
        assert (plain.labels != IGNORED).sum() < plain.attention_mask.sum()
        assert len(plain.input_ids) == int((packed.position_ids == 0).sum()) - _paddings(packed)


def _paddings(batch: object) -> int:
    """Stretches of padding: each has a position 0 of its own."""
    mask = batch.attention_mask  # type: ignore[attr-defined]
    places = batch.position_ids  # type: ignore[attr-defined]
    return int(((mask == 0) & (places == 0)).sum())


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    one = rounds.Arm("a", tuple(Turn(s, s, 1.0) for s in (1.0, 2.0, 4.0)), (), 10, 8)
    two = rounds.Arm("b", tuple(Turn(s, s, 1.0) for s in (2.0, 4.0, 40.0)), (), 10, 8)
    assert rounds.ratio(two, one, "seconds") == 2.0


@pytest.mark.slow
def test_the_arms_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1024}
    monkeypatch.setitem(random_model.SHAPES, "small", random_model.QWEN2_04B | small)
    base = random_model.random_model("small", tmp_path)
    found = rounds.measure(base, list(rounds.ARMS), SHAPE, steps=2)
    assert [arm.name for arm in found] == list(rounds.ARMS)
    plain, *others = found
    assert plain.losses[-1] < plain.losses[0] - 0.05
    for arm in others:
        assert arm.losses == pytest.approx(plain.losses, abs=5e-3)
        assert arm.peak_bytes > 1 << 20
