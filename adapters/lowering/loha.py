"""LoHa as a LoRA of rank r².

(w1a w1b) ⊙ (w2a w2b) = Σ_ij (w1a_i ⊙ w2a_j) (w1b_i ⊙ w2b_j)ᵀ: the columns of B are all products of
a column of w1a and one of w2a, the rows of A those of w1b and w2b (Khatri-Rao products).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.delta import Delta, LinearDelta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import low_rank
from .whole import lower_saved


def lower_loha(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas, take = lower_saved(config, checkpoint, base), checkpoint.take
    for path in config["target_modules"]:
        shape = base.spec.linears[path]
        checkpoint.take_base_copy(path, base.linear(path).weight)
        rank = int(config["rank_pattern"].get(path, config["r"]))
        alpha = float(config["alpha_pattern"].get(path, config["alpha"]))
        first, second = (
            (
                take(f"{path}.hada_w{n}_a", shape.out_features, rank),
                take(f"{path}.hada_w{n}_b", rank, shape.in_features),
            )
            for n in (1, 2)
        )
        B = (first[0][:, :, None] * second[0][:, None, :]).flatten(1).mul_(alpha / rank)
        A = (first[1][:, None, :] * second[1][None, :, :]).flatten(0, 1)
        deltas[path] = LinearDelta((low_rank(A, B, base),))
    return deltas
