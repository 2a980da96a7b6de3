"""Layers that are computed twice give the same weights, and keep less on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from base.load import Base
from tests.training.runs import run_of
from training.data import Example
from training.errors import MethodError
from training.loss import head_of
from training.methods import attach
from training.recipe import Run

PAIRS = [Example((10 + i, 50 + 3 * i, 90 + i, 2), 1) for i in range(12)]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 2, "dropout": 0.3}),
    ("dora", {"rank": 2}),
    ("bottleneck", {"variant": "pfeiffer"}),
    ("prompt_tuning", {"virtual_tokens": 3}),
]


def _weights(base: Base, again: bool, kind: str, method: dict[str, Any]) -> tuple[Any, int, int]:
    """After three steps; how often the first layer ran, and how many values the graph kept."""
    head_of(base)  # its trial is no part of this
    config = run_of(kind, optim={"steps": 3, "checkpointing": again}, **method)
    torch.manual_seed(0)
    adapter = attach(base, config)
    run = Run(base, adapter, PAIRS, config)
    calls, kept = 0, 0

    def count(*given: Any) -> None:
        nonlocal calls
        calls += 1

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    hook = base.model.model.layers[0].input_layernorm.register_forward_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(3):
            run.step()
    hook.remove()
    weights = [p.detach().clone() for p in adapter.parameters()]
    adapter.detach()
    assert not any("forward" in vars(layer) for layer in base.model.model.layers)
    return weights, calls, kept


@pytest.mark.parametrize(("kind", "method"), KINDS)
def test_the_weights_are_the_same_bits(base: Base, kind: str, method: dict[str, Any]) -> None:
    once, first, much = _weights(base, False, kind, method)
    twice, second, little = _weights(base, True, kind, method)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert second - first == 3  # each of three steps runs the layer once more
    assert little < much / 2


def test_a_cache_is_not_filled_twice(base: Base) -> None:
    config = run_of("prefix_tuning", optim={"checkpointing": True}, virtual_tokens=2)
    adapter = attach(base, config)
    with pytest.raises(MethodError, match="checkpointing=false is right"):
        Run(base, adapter, PAIRS, config)
    adapter.detach()
