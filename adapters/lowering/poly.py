"""Poly of one task as a LoRA: the task's weights mix the skills of each split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import low_rank
from .whole import lower_saved

_EPSILON = 1e-12  # PEFT's, against a task that uses no skill


@torch.no_grad()
def lower_poly(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = lower_saved(config, checkpoint, base)
    take, rank = checkpoint.take, config["r"]
    splits, skills = config["n_splits"], config["n_skills"]
    for path in config["target_modules"]:
        shape = base.spec.linears[path]
        checkpoint.take_base_copy(path, base.linear(path).weight)
        across, down = shape.in_features // splits, shape.out_features // splits
        A = take(f"{path}.poly_lora_A", splits, skills, across, rank)
        B = take(f"{path}.poly_lora_B", splits, skills, rank, down)
        logits = take(f"{path}.poly_router.module_logits", 1, splits * skills)
        used = torch.sigmoid(logits).view(splits, skills)
        used = used / (used.sum(dim=1, keepdim=True) + _EPSILON)
        mixed_a = torch.einsum("qs,qsdr->qdr", used, A).reshape(shape.in_features, rank)
        mixed_b = torch.einsum("qs,qsrd->qdr", used, B).reshape(shape.out_features, rank)
        deltas[path] = LinearDelta((low_rank(mixed_a.t().contiguous(), mixed_b / rank, base),))
    return deltas
