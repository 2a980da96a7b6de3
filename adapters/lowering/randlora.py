"""RandLoRA: a sum of random low-rank terms up to full rank, so it is a private matrix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.delta import Delta
from adapters.errors import InvalidAdapter
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .dense import Change, Dense, added, dense
from .target import Target, targets
from .whole import lower_saved


def lower_randlora(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta | Dense]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta | Dense] = {**lower_saved(config, checkpoint, base)}
    short, long, rank = config["short_side"], config["long_side"], config["r"]
    A = checkpoint.take_shared("randlora_A", rank, 1, short)
    B = checkpoint.take_shared("randlora_B", long, -(-short // rank), rank)
    for target in targets(config, checkpoint, base):
        _take_copies(target, A, B)
        bases = -(-min(target.m, target.n) // rank)
        scaled = target.take("randlora_lambda", rank, bases) * (config["randlora_alpha"] / rank)
        gamma = target.take("randlora_gamma", bases, min(target.m, target.n))
        deltas[target.path] = dense(
            target.path, base, partial(_updated, A, B, scaled, gamma, target.m, target.n)
        )
    return deltas


def _take_copies(target: Target, A: Tensor, B: Tensor) -> None:
    """PEFT saves what all layers share with each of them again."""
    for leaf, own in (("randlora_A", A), ("randlora_B", B)):
        name = f"{target.path}.{leaf}"
        if target.checkpoint.has(name) and not target.take(leaf, *own.shape).equal(own):
            raise InvalidAdapter("differs from the one that all layers share", name)


def _updated(A: Tensor, B: Tensor, scaled: Tensor, gamma: Tensor, m: int, n: int) -> Change:
    """W + Σ B λ A γ over all bases, or the transpose of the sum where W is wider than high.

    A [r, 1, short] is cut to the shorter side of W, B [long, bases, r] to the longer one.
    """
    bases, short = gamma.shape
    left = B[: max(m, n), :bases].flatten(1)  # [long, bases r]
    # The terms of B lie base by base, those of A rank by rank: so PEFT pairs them.
    right = (scaled[:, :, None] * A[:, :, :short] * gamma).flatten(0, 1)
    if n <= m:  # as wide as the shorter side
        return added(lambda start, stop: left[start:stop] @ right)
    return added(lambda start, stop: right[:, start:stop].t() @ left.t())
