"""A feed-forward part that keeps g and u alone computes what transformers' does."""

from __future__ import annotations

import pytest
import torch

from base.load import Base
from tests.training.runs import run_of
from training.data import Example
from training.data.batches import collate
from training.loss import batch_loss
from training.methods import attach
from training.rematerialise import lean

BATCH = collate([Example((10, 50, 91, 7, 2), 2), Example((11, 51, 2), 1)], 0)


@pytest.mark.parametrize("kind", ["lora", "dora", "bitfit", "bottleneck"])
def test_gradients_are_those_of_transformers_own(base: Base, kind: str) -> None:
    adapter = attach(base, run_of(kind))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    found, kept = [], []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    for plain in (True, False):
        seen: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if plain:
                loss = batch_loss(base, BATCH, adapter)
            else:
                with lean(base.model):
                    loss = batch_loss(base, BATCH, adapter)
        found.append([loss, *torch.autograd.grad(loss, adapter.parameters())])
        kept.append(sum(seen.values()))
    adapter.detach()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    inner = base.model.config.intermediate_size * BATCH.input_ids.numel()
    layers = base.spec.num_layers
    fewer = {"lora": 2, "dora": 2, "bitfit": 1, "bottleneck": 1}[kind]  # tensors as wide as g
    assert kept[0] - kept[1] >= fewer * inner * (layers - 1)
    assert not any("forward" in vars(module) for module in base.model.modules())
