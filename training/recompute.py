"""Gradient checkpointing: what a layer computed is thrown away and computed again on the way back.

"Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174. A third more arithmetic; of all
layers but one only the input stays. The gradients are the same bits, dropout included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from training.errors import MethodError


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Within it, the model's layers are computed twice.

    transformers' own switch works in training mode only, which would turn on a base's dropout.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def refuse_if_not_recomputable(model: Any, kind: str, through_cache: bool) -> None:
    """Raises MethodError where a second pass over a layer would not be the first one again."""
    if through_cache:
        raise MethodError(
            f"optim.checkpointing: {kind} hands its keys over in a cache, which a second pass "
            "would fill twice; optim.checkpointing=false is right"
        )
    if not any(isinstance(m, GradientCheckpointingLayer) for m in model.modules()):
        raise MethodError(
            f"optim.checkpointing: {type(model).__name__} has no layers that transformers marks "
            "as such; optim.checkpointing=false is right"
        )
