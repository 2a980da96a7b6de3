"""PVeRA as VeRA: at inference the upper half of A and d, which gives the mean, is all there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.delta import Delta, LinearDelta, LowRank
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .target import targets
from .vera import Corners, projections
from .whole import lower_saved


def lower_pvera(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = {**lower_saved(config, checkpoint, base)}
    rank, shapes = config["r"], [base.spec.linears[path] for path in config["target_modules"]]
    width = max(shape.in_features for shape in shapes)
    height = max(shape.out_features for shape in shapes)
    if config["save_projection"]:
        A = checkpoint.take_shared("pvera_A", 2 * rank, width)
        B = checkpoint.take_shared("pvera_B", height, rank)
    else:
        A, B = projections(config["projection_prng_key"], (2 * rank, width), (height, rank))
    corners = Corners(A[:rank].contiguous(), B, base)
    for target in targets(config, checkpoint, base):
        term = LowRank(
            corners.of_a(target.n),
            corners.of_b(target.m),
            d=target.take("pvera_lambda_d", 2 * rank)[:rank].clone(),
            s=target.take("pvera_lambda_b", target.m),
        )
        deltas[target.path] = LinearDelta((term,))
    return deltas
