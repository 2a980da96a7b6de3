"""HRA as a LoRA: a product of Householder reflections is I + P Uᵀ, so W R x = W x + (W P)(Uᵀ x)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.delta import Delta, LinearDelta
from adapters.errors import InvalidAdapter
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import low_rank
from .target import targets
from .whole import lower_saved


def lower_hra(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas = lower_saved(config, checkpoint, base)
    for target in targets(config, checkpoint, base):
        U = target.take("hra_u", target.n, config["r"])
        unit = _orthonormal(U) if config["apply_GS"] else U / U.norm(dim=0)
        if not bool(unit.isfinite().all()):
            raise InvalidAdapter(
                "holds a vector of zeros, or one that depends on those before it, which reflects "
                "nothing",
                f"{target.path}.hra_u",
            )
        P = -2 * unit if config["apply_GS"] else _reflections(unit)
        deltas[target.path] = LinearDelta((low_rank(unit.t(), target.times(P), base),))
    return deltas


def _reflections(unit: Tensor) -> Tensor:
    """P [n, r] of (I - 2 u_1 u_1ᵀ) ... (I - 2 u_r u_rᵀ) = I + P Uᵀ, for unit columns u_i of U.

    Column i is -2 (I + P_{<i} U_{<i}ᵀ) u_i: the compact form of Bischof and Van Loan 1987, "The WY
    representation for products of Householder matrices".
    """
    P, U = torch.zeros_like(unit, dtype=torch.float64), unit.double()
    for i in range(U.shape[1]):
        u = U[:, i]
        P[:, i] = -2 * (u + P[:, :i] @ (U[:, :i].t() @ u))
    return P.float()


def _orthonormal(U: Tensor) -> Tensor:
    """Columns by Gram and Schmidt, in the order of PEFT's `get_delta_weight`."""
    columns: list[Tensor] = []
    for i in range(U.shape[1]):
        u = U[:, i]
        for v in columns:
            u = u - (v @ u) * v
        columns.append(u / u.norm())
    return torch.stack(columns, dim=1)
