"""VeRA: y += b ⊙ B (d ⊙ (A x)), where A and B are the corners of two matrices that all share.

All layers of an adapter, and all adapters of one seed, hold the same tensors in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from adapters.delta import Delta, LinearDelta, LowRank
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import by_columns, factor_dtype
from .shared import shared
from .whole import lower_saved


def lower_vera(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas, take, rank = lower_saved(config, checkpoint, base), checkpoint.take, config["r"]
    shapes = {path: base.spec.linears[path] for path in config["target_modules"]}
    width = max(shape.in_features for shape in shapes.values())
    height = max(shape.out_features for shape in shapes.values())
    if config["save_projection"]:
        A = checkpoint.take_shared("vera_A", rank, width)
        B = checkpoint.take_shared("vera_B", height, rank)
    else:
        A, B = projections(config["projection_prng_key"], (rank, width), (height, rank))
    corners = Corners(A, B, base)
    for path, shape in shapes.items():
        checkpoint.take_base_copy(path, base.linear(path).weight)
        term = LowRank(
            corners.of_a(shape.in_features),
            corners.of_b(shape.out_features),
            d=take(f"{path}.vera_lambda_d", rank),
            s=take(f"{path}.vera_lambda_b", shape.out_features),
        )
        deltas[path] = LinearDelta((term,))
    return deltas


def projections(key: int, a: tuple[int, int], b: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A and B of these shapes as PEFT draws them (`_init_vera_A_vera_B`), on the CPU.

    He's uniform initialisation over the columns of each, from one generator, A first. torch's
    generator for the CPU is a Mersenne twister, which gives the same numbers on every machine.
    """
    generator = torch.Generator(device="cpu").manual_seed(key)
    return _uniform(a, generator), _uniform(b, generator)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    # The order of the roots is PEFT's: another one rounds differently.
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Corners:
    """The parts of A and B that layers of one size use, each once in memory."""

    def __init__(self, A: Tensor, B: Tensor, base: Base) -> None:
        self.A, self.B = A, B
        self.dtype, self.device = factor_dtype(base), base.device
        self.digest = sha256(A.cpu().numpy().tobytes() + B.cpu().numpy().tobytes()).digest()

    def of_a(self, width: int) -> Tensor:
        return self._kept("A", width, self.A[:, :width])

    def of_b(self, height: int) -> Tensor:
        return self._kept("B", height, self.B[:height])

    def _kept(self, which: str, size: int, corner: Tensor) -> Tensor:
        def make() -> Tensor:
            placed = corner.to(self.device, self.dtype)
            # In its own memory: a view would keep the whole matrix alive.
            return (placed.contiguous() if which == "A" else by_columns(placed)).clone()

        return shared(("vera", self.digest, which, size, self.dtype, str(self.device)), make)
