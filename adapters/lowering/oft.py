"""OFT: the matrix of each block, from the numbers above its diagonal.

Each block of numbers is a skew-symmetric Q, and the block of x is multiplied by the Cayley
transform (I - Q)(I + Q)⁻¹, or by the first terms of its series, which PEFT prefers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.block_sizes import oft_block_size
from adapters.delta import Delta, LinearDelta
from adapters.maps import BlockMap
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .whole import lower_saved


@torch.no_grad()
def lower_oft(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = lower_saved(config, checkpoint, base)
    terms = config["num_cayley_neumann_terms"]
    for path in config["target_modules"]:
        width = base.spec.linears[path].in_features
        checkpoint.take_base_copy(path, base.linear(path).weight)
        size = oft_block_size(width, config["r"], config["oft_block_size"])
        blocks = 1 if config["block_share"] else width // size
        numbers = checkpoint.take(f"{path}.oft_R.weight", blocks, size * (size - 1) // 2)
        Q = _skew(numbers, size)
        if config["eps"] is not None:
            Q = _constrained(Q, config["eps"])
        R = cayley(Q) if terms is None else _series(Q, terms)
        deltas[path] = LinearDelta(blocks=(BlockMap(R),))
    return deltas


def cayley(Q: Tensor) -> Tensor:
    """(I - Q)(I + Q)⁻¹ of skew-symmetric matrices [n, size, size]."""
    one = torch.eye(Q.shape[-1], device=Q.device)
    R: Tensor = torch.linalg.solve(one + Q, one - Q, left=False)
    return R


def _skew(numbers: Tensor, size: int) -> Tensor:
    """[n, size (size - 1) / 2] above the diagonal, row by row -> [n, size, size]."""
    upper = numbers.new_zeros(len(numbers), size, size)
    rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)
    upper[:, rows, columns] = numbers
    return upper - upper.transpose(1, 2)


def _constrained(Q: Tensor, eps: float) -> Tensor:
    """COFT keeps each block's norm below eps / √n: PEFT does so before every use."""
    bound = eps / torch.sqrt(torch.tensor(float(len(Q))))
    norms = torch.linalg.matrix_norm(Q, keepdim=True)
    return torch.where(norms <= bound, Q, bound * (Q / norms))


def _series(Q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q² + ... + Qⁿ⁻¹ (PEFT's `_cayley_batch`; of two terms, the last has its 2)."""
    R = torch.eye(Q.shape[-1], device=Q.device).repeat(len(Q), 1, 1)
    if terms > 1:
        R += 2 * Q
    if terms > 2:
        power = Q @ Q
        R += 2 * power
        for _ in range(3, terms - 1):
            power = power @ Q
            R += 2 * power
        R += power @ Q
    return R
