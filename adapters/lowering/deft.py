"""DEFT as a LoRA: W - Q Pᵀ W + Q R = W + Q (R - Pᵀ W), where Pᵀ W is computed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import low_rank
from .target import targets
from .whole import lower_saved


def lower_deft(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas = lower_saved(config, checkpoint, base)
    for target in targets(config, checkpoint, base):
        rank = min(config["r"], target.m)
        Q, right = _projection(
            target.take("deft_P", target.m, rank), config["decomposition_method"]
        )
        A = -target.times_left(right)
        if not config["para"]:
            scale = config["alpha"] / rank if config["alpha"] else 1.0
            A += scale * target.take("deft_R", rank, target.n)
        deltas[target.path] = LinearDelta((low_rank(A, Q, base),))
    return deltas


def _projection(P: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """The two sides of the projection that is taken out of W, both [m, r]."""
    if method == "relu":
        return P, P.relu()
    # On the CPU: R was trained for the signs that LAPACK gives the columns of Q.
    Q = torch.linalg.qr(P.cpu())[0].to(P.device)
    return Q, Q
