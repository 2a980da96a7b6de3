"""The loss in pieces against the model's own logits, on several families; its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import GraniteConfig

from base.load import Base, load_base
from tests.base.tiny import CONFIGS, SIZES, save_tiny
from tests.training.runs import run_of
from training import loss
from training.data import Example
from training.data.batches import TrainBatch, collate, collate_packed
from training.methods import attach
from training.recipe import Run

DATA = [Example((10, 50, 91, 7, 2), 2), Example((11, 51, 2), 1), Example((12, 52, 92, 2), 3)]


FAMILIES = {  # whose logits are W h; a head kept in bf16; c tanh(W h / c); and a scaled one
    "qwen2": (CONFIGS["qwen2"], torch.float32, True),
    "qwen2-bf16": (CONFIGS["qwen2"], torch.bfloat16, True),
    "gemma2": (CONFIGS["gemma2"], torch.float32, True),
    "granite": (GraniteConfig(**SIZES, logits_scaling=4.0), torch.float32, False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dtype, in_pieces = FAMILIES[name]
    save_tiny(config, tmp_path, dtype=dtype)
    family = load_base(tmp_path, device="cpu", dtype="float32", keep=False)
    assert (loss.head_of(family) is not None) is in_pieces
    monkeypatch.setattr(loss, "LOGITS_BYTES", 2 * 4 * family.spec.vocab_size)  # two tokens at once
    adapter = attach(family, run_of(rank=2))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    for batch in (collate(DATA, 0), collate_packed([DATA[:2], DATA[2:]], 0)):
        got = loss.batch_loss(family, batch, adapter)
        ours = torch.autograd.grad(got, adapter.parameters())
        want = _whole(family, batch)
        theirs = torch.autograd.grad(want, adapter.parameters())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    adapter.detach()


def _whole(base: Base, batch: TrainBatch) -> torch.Tensor:
    more = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    logits = base.model(input_ids=batch.input_ids, use_cache=False, **more).logits
    labels = batch.labels[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)


def test_no_more_logits_than_the_bound_are_ever_there(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    plain = loss.Head.logits

    def noted(head: loss.Head, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return plain(head, hidden)

    loss.head_of(base)  # its trial is no part of this
    monkeypatch.setattr(loss.Head, "logits", noted)
    monkeypatch.setattr(loss, "LOGITS_BYTES", 3 * 4 * base.spec.vocab_size)
    batch = collate(DATA, 0)
    with torch.no_grad():
        loss.batch_loss(base, batch)
    assert (max(rows), sum(rows)) == (3, batch.loss_tokens)


def test_a_fresh_adapters_dropout_has_no_part_in_the_trial(base: Base) -> None:
    loss._HEADS.pop(base.model, None)
    config = run_of(rank=2, dropout=0.5, optim={"steps": 1})
    adapter = attach(base, config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.5)
    state = torch.get_rng_state()
    Run(base, adapter, DATA, config)
    assert loss.head_of(base) is not None
    assert torch.equal(torch.get_rng_state(), state)
    adapter.detach()
