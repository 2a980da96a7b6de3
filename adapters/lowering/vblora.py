"""VB-LoRA, folded into a LoRA: the softmax over the best k logits mixes vectors of the bank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import low_rank
from .whole import lower_saved


def lower_vblora(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas = lower_saved(config, checkpoint, base)
    rank, vectors, length = (config[name] for name in ("r", "num_vectors", "vector_length"))
    bank = checkpoint.take_shared("vblora_vector_bank", vectors, length)
    for path in config["target_modules"]:
        shape, start = base.spec.linears[path], f"{path}.vblora_logits_"
        checkpoint.take_base_copy(path, base.linear(path).weight)
        across = checkpoint.take(f"{start}A", rank, shape.in_features // length, vectors)
        down = checkpoint.take(f"{start}B", shape.out_features // length, rank, vectors)
        A = _mixed(across, bank, config["topk"]).reshape(rank, -1)
        B = _mixed(down, bank, config["topk"]).transpose(1, 2).reshape(-1, rank)
        deltas[path] = LinearDelta((low_rank(A, B, base),))
    return deltas


def _mixed(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """[..., vectors] logits and the bank [vectors, length] -> [..., length]."""
    best, which = logits.topk(topk, dim=-1)
    return (best.softmax(-1)[..., None] * bank[which]).sum(-2)
