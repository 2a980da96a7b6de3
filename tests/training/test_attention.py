"""Attention by documents is transformers' own, in values and gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from base.load import Base
from tests.training.runs import run_of
from training.attention import NAME, by_document, documents
from training.data import Example
from training.data.batches import TrainBatch, collate, collate_packed
from training.loss import batch_loss
from training.methods import attach

ONE, OTHER, THIRD = (Example((5 + i, *range(40 + i, 44 + 2 * i), 2), 1) for i in range(3))
PACKED = collate_packed([[ONE, OTHER], [THIRD]], 0)
PADDED = collate([ONE, OTHER, THIRD], 0)


def test_documents_begin_where_positions_do() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    assert documents(positions, 2) == [(0, 0, 3), (0, 3, 5), (1, 0, 1), (1, 1, 5)]
    assert documents(torch.arange(4)[None], 2) == [(0, 0, 4), (1, 0, 4)]
    assert documents(torch.tensor([[3, 4, 0]]), 1) == [(0, 0, 2), (0, 2, 3)]


@pytest.mark.parametrize("batch", [PACKED, PADDED], ids=["packed", "padded"])
def test_loss_and_gradients_are_those_of_transformers_masks(base: Base, batch: TrainBatch) -> None:
    assert base.model.config.num_attention_heads > base.model.config.num_key_value_heads
    adapter = attach(base, run_of("lora"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    found = []
    for own in (False, True):
        with by_document(base.model, batch.input_ids.shape[1]) if own else nullcontext():
            assert (base.model.config._attn_implementation == NAME) is own
            loss = batch_loss(base, batch, adapter)
        found.append([loss, *torch.autograd.grad(loss, adapter.parameters())])
    adapter.detach()
    assert base.model.config._attn_implementation == "sdpa"
    for ours, theirs in zip(*reversed(found), strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-7


def test_a_window_that_a_row_does_not_fit_into_is_left_to_transformers(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.model.model.layers[1].self_attn, "sliding_window", 8)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    mistral = MistralForCausalLM(MistralConfig(**sizes, **heads))  # has it in its config alone
    for model in (base.model, mistral):
        for length, ours in ((8, True), (9, False)):
            with by_document(model, length):
                assert (model.config._attn_implementation == NAME) is ours
