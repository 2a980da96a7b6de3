"""Places in a matrix that a method draws from a seed instead of saving them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def random_places(seed: int, size: int, count: int) -> Tensor:
    """The first `count` of a random permutation of [0, size), int64 on the CPU; not to be written.

    As PEFT draws them (FourierFT, WaveFT). torch's generator for the CPU is a Mersenne twister,
    which gives the same numbers on every machine. Layers of one shape share the result.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count].clone()
