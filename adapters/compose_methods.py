"""Ways to make one tensor of several: PEFT's `add_weighted_adapter`, tensor by tensor.

    linear            Σ w_i t_i                            (task arithmetic: Ilharco et al. 2022)
    magnitude_prune   Σ w_i top(t_i)                       the largest `density` of each
    dare_linear       Σ w_i m_i ⊙ t_i / density            a random mask (Yu et al. 2023)
    ties              Σ w_i e_i ⊙ top(t_i) / Σ e_i         e: its sign agrees (Yadav et al. 2023)
    dare_ties         the same with the random mask

The masks come from torch's generator in PEFT's order, so that a seed gives PEFT's own masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to prune each tensor, and how to add what is left."""

    density: float = 1.0
    majority_sign: MajoritySign = "total"
    generator: torch.Generator | None = None


def by_magnitude(tensor: Tensor, recipe: Recipe) -> Tensor:
    """The largest `density` of the numbers; the others are 0."""
    if recipe.density >= 1:
        return tensor
    flat = tensor.abs().flatten()
    kept = torch.zeros_like(flat)
    kept[flat.topk(int(recipe.density * flat.numel())).indices] = 1
    return tensor * kept.view_as(tensor)


def at_random(tensor: Tensor, recipe: Recipe) -> Tensor:
    """Each number with probability `density`, and scaled so that the mean stays."""
    if recipe.density >= 1:
        return tensor
    chance = torch.full_like(tensor, recipe.density)
    return tensor * torch.bernoulli(chance, generator=recipe.generator) / recipe.density


def added(stacked: Tensor, weights: Tensor, recipe: Recipe) -> Tensor:
    """Σ w_i t_i of stacked [n, ...]."""
    del recipe
    return (stacked * weights).sum(dim=0)


def agreeing(stacked: Tensor, weights: Tensor, recipe: Recipe) -> Tensor:
    """The mean of w_i t_i over those whose sign is the majority's; 0 counts as neither."""
    sign = stacked.sign()
    votes = stacked if recipe.majority_sign == "total" else sign
    agrees = sign == torch.where(votes.sum(dim=0) >= 0, 1, -1)
    return (stacked * weights * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


Prune = Callable[[Tensor, Recipe], Tensor]
Add = Callable[[Tensor, Tensor, Recipe], Tensor]

WAYS: Mapping[str, tuple[Prune | None, Add]] = {
    "linear": (None, added),
    "magnitude_prune": (by_magnitude, added),
    "ties": (by_magnitude, agreeing),
    "dare_linear": (at_random, added),
    "dare_ties": (at_random, agreeing),
}


def combine(
    way: str, tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe
) -> Tensor:
    """One tensor of several of one shape."""
    prune, add = WAYS[way]
    kept = [tensor if prune is None else prune(tensor, recipe) for tensor in tensors]
    stacked = torch.stack(kept)
    factors = torch.tensor(list(weights), dtype=stacked.dtype)
    return add(stacked, factors.view(-1, *([1] * (stacked.dim() - 1))), recipe)


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with B A the best approximation of the matrix [out, in]."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


def truncated_product(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`truncated(B @ A, rank)` without B A: A [R, in], B [out, R], a decomposition of R by R."""
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.t())
    inner_A, inner_B = truncated(left.R @ right.R.t(), rank)
    return inner_A @ right.Q.t(), left.Q @ inner_B
