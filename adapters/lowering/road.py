"""RoAd: y_i -> a cos θ y_i -/+ a sin θ y_partner, for the two numbers of each pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.checks.road import VARIANTS
from adapters.delta import Delta, LinearDelta
from adapters.maps import PairMap
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .whole import lower_saved


@torch.no_grad()
def lower_road(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = lower_saved(config, checkpoint, base)
    for path in config["target_modules"]:
        shape, linear = base.spec.linears[path], base.linear(path)
        checkpoint.take_base_copy(path, linear.weight)
        angles = shape.out_features // 2 * VARIANTS[config["variant"]]
        theta = checkpoint.take(f"{path}.road_theta", angles)
        alpha = checkpoint.take(f"{path}.road_alpha", angles)
        pairs = _pairs(config["variant"], config["group_size"] // 2, theta, alpha)
        bias = None if linear.bias is None else pairs(linear.bias.detach().float())
        deltas[path] = LinearDelta(bias=bias, pairs=pairs)
    return deltas


def _pairs(variant: str, half: int, theta: Tensor, alpha: Tensor) -> PairMap:
    """PEFT's `_prepare_cols` and `_apply_road` as one map; theta and alpha [angles].

    road_1 has one angle for both numbers of a pair, road_2 one for each, road_4 one for each of
    the pair's four products: in each group, the numbers' own first, then those of their partners.
    """
    if variant == "road_1":
        theta, alpha = (v.view(-1, 1, half).expand(-1, 2, -1).flatten() for v in (theta, alpha))
    own, other = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_4":
        own = own.view(-1, 2, 2 * half)[:, 0].flatten()
        other = other.view(-1, 2, 2 * half)[:, 1].flatten()
    # The first of a pair gets its partner with a minus.
    sign = torch.tensor([-1.0, 1.0], device=other.device)[:, None]
    return PairMap(own.clone(), (other.view(-1, 2, half) * sign).flatten(), half)
