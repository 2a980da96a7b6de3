"""Packed rows: no example sees another, whatever PEFT puts on the base."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from base.load import Base
from tests.training.runs import run_of
from training.config import TrainConfig
from training.data import Example
from training.data.batches import IGNORED, Batches, TrainBatch, collate, collate_packed
from training.data.packing import bins, refuse_if_mixed
from training.errors import ConfigError
from training.loss import batch_loss
from training.methods import attach
from training.plan import make_plan
from training.recipe import Run

STOP = 2
A = Example((10, 11, 12, 13, STOP), 2)
B = Example((20, 21, STOP), 1)
C = Example((30, 31, 32, 33, 34, 35, STOP), 6)
D = Example((7, STOP), 0)  # an answer to nothing


def _packing(kind: str = "lora", **optim: int) -> TrainConfig:
    config = run_of(kind, optim=optim or None)
    data = config.data.model_copy(update={"packing": True, "max_length": 12})
    return config.model_copy(update={"data": data})


def test_positions_begin_again_and_first_tokens_have_no_label() -> None:
    batch = collate_packed([[B, D], [A, B]], pad_id=0)
    assert batch.input_ids.tolist() == [
        [20, 21, STOP, 7, STOP, 0, 0, 0],
        [10, 11, 12, 13, STOP, 20, 21, STOP],
    ]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2]]
    x = IGNORED
    assert batch.labels.tolist() == [
        [x, 21, STOP, x, STOP, x, x, x],
        [x, x, 12, 13, STOP, x, 21, STOP],
    ]
    assert int(batch.attention_mask.sum()) == 13


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "oft"])
def test_packed_gradients_are_the_unpacked_ones(base: Base, kind: str) -> None:
    torch.manual_seed(0)
    adapter = attach(base, run_of(kind))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)

    def gradients(batch: TrainBatch) -> list[torch.Tensor]:
        loss = batch_loss(base, batch, adapter)
        return [loss.detach(), *torch.autograd.grad(loss, adapter.parameters())]

    want = gradients(collate([A, B, C, D], pad_id=0))
    got = gradients(collate_packed([[C, A], [B, D]], pad_id=0))
    mixed = collate_packed([[C, A], [B, D]], pad_id=0)
    seen = gradients(TrainBatch(mixed.input_ids, mixed.attention_mask, mixed.labels))
    adapter.detach()

    def apart(ours: list[torch.Tensor]) -> float:
        pairs = zip(ours, want, strict=True)
        return max(float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in pairs)

    assert apart(got) < 1e-4
    assert apart(seen) > 1e-2  # and without positions it would show


def test_attention_that_mixes_examples_is_refused(base: Base) -> None:
    refuse_if_mixed(base.model, base.device)

    def forgetful(*, position_ids: torch.Tensor | None = None, **inputs: torch.Tensor) -> object:
        return base.model(**inputs)

    forgetful.parameters = base.model.parameters  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="does not keep packed examples apart"):
        refuse_if_mixed(forgetful, base.device)
    adapter = attach(base, run_of("prompt_tuning", virtual_tokens=3))
    with pytest.raises(ConfigError, match="virtual tokens"):
        Run(base, adapter, [A], _packing("prompt_tuning"))
    adapter.detach()


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(20, 50))
def test_bins_hold_everything_once_and_are_not_overfull(lengths: list[int], capacity: int) -> None:
    rows = bins(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[i] for i in row) <= capacity
    fits = [n for n in lengths if n <= capacity]
    assert len(rows) <= 2 * sum(fits) // capacity + 1 + (len(lengths) - len(fits))


def test_an_epoch_packs_every_example_once_and_the_cursor_goes_on() -> None:
    data = [Example((100 + i, *([3] * (i % 7)), STOP), 1) for i in range(90)]
    stream = Batches(data, 4, 0, seed=5, pack=16)
    epoch = [next(stream) for _ in range(stream.per_epoch)]
    ids = torch.cat([batch.input_ids.flatten() for batch in epoch])
    assert sorted(ids[ids >= 100].tolist()) == list(range(100, 190))
    assert all(batch.input_ids.shape[1] <= 16 for batch in epoch)
    tokens = sum(len(example.tokens) for example in data)
    assert sum(batch.input_ids.numel() for batch in epoch) < 1.1 * tokens
    other = Batches(data, 4, 0, seed=5, pack=16)
    other.cursor = (0, 3)
    for want, got in zip(epoch[3:], itertools.islice(other, len(epoch) - 3), strict=True):
        assert torch.equal(want.input_ids, got.input_ids)
    assert not torch.equal(next(stream).input_ids, epoch[0].input_ids)


def test_a_packed_run_resumes_with_the_same_bits(base: Base) -> None:
    config = _packing(steps=6, batch_size=2)
    data = [Example((10 + i, *range(50, 51 + i % 5), STOP), 1) for i in range(12)]

    def weights(cut: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        adapter = attach(base, config)
        run = Run(base, adapter, data, config)
        for step in range(6):
            if step == cut:
                state = run.state()
                run = Run(base, adapter, data, config)
                run.restore(state)
            run.step()
        adapter.detach()
        return adapter.parameters()

    pairs = zip(weights(cut=9), weights(cut=4), strict=True)
    assert all(torch.equal(whole, resumed) for whole, resumed in pairs)


def test_a_packed_run_learns_and_is_planned(base: Base, tmp_path: Path) -> None:
    config = _packing(steps=20, batch_size=2)
    data = [Example((10 + i, 50 + 3 * i, 90 + i, STOP), 1) for i in range(12)]
    plan = make_plan(base, data, config)
    assert plan.epochs == 10.0  # four rows of three examples, two rows a step
    adapter = attach(base, config)
    run = Run(base, adapter, data, config)
    losses = [run.step().loss for _ in range(20)]
    adapter.detach()
    assert losses[-1] < 0.8 * losses[0]
