"""TinyLoRA as a LoRA: B R A with R = Σ v_i P_i, where B and A are factors of the weight."""

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


def lower_tinylora(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = {**lower_saved(config, checkpoint, base)}
    u, groups, seeds = config["u"], config["groups"], config["seeds"]
    vectors = {
        group: checkpoint.take_shared(f"tinylora_v.{group}", u) for group in set(groups.values())
    }
    for target in targets(config, checkpoint, base):
        rank = min(config["r"], target.m, target.n)
        if seeds is None:
            P = target.take("tinylora_P", u, rank, rank)
        else:
            P = _drawn(seeds[target.path], u, rank).to(base.device)
        R = torch.einsum("i,ijk->jk", vectors[groups[target.path]], P)
        A, B = target.take("tinylora_A", rank, target.n), target.take("tinylora_B", target.m, rank)
        deltas[target.path] = LinearDelta((low_rank(A, B @ R, base),))
    return deltas


def _drawn(seed: int, u: int, rank: int) -> Tensor:
    """P [u, rank, rank] as PEFT draws it (`_init_projection`), on the CPU."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.normal(0.0, 1.0 / rank**0.5, size=(u, rank, rank), generator=generator)
