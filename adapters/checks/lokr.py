"""LoKr: the update is a Kronecker product of two small matrices, each whole or of low rank.

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.config_rules import (
    COMMON,
    LAYERS,
    Rule,
    alpha,
    flag,
    ignore,
    pattern,
    present,
    rank,
    targets,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.ranks import alpha_of, check_rank, check_scale, ranks_of
from adapters.safetensors_header import Header
from base.spec import BaseSpec


def _factor(name: str, value: Any) -> None:
    if type(value) is not int or (value < 1 and value != -1):
        raise InvalidAdapter(f"{str(value)[:80]}, expected -1 or an integer from 1", name)


RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    "r": rank,
    "alpha": alpha,
    "rank_pattern": pattern(rank),
    "alpha_pattern": pattern(alpha),
    "decompose_both": flag,
    "decompose_factor": _factor,
    "exclude_modules": targets,
    "rank_dropout": ignore,  # off at inference
    "rank_dropout_scale": ignore,
    "module_dropout": ignore,
    "use_effective_conv2d": flag,  # of convolutions, and only linears are targets
    "init_weights": ignore,  # the file holds them
}


def check_lokr(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("LoKr", config, RULES, header, spec)
    r, a = int(present(config, "r")), float(present(config, "alpha"))
    both, factor = bool(config.get("decompose_both")), int(present(config, "decompose_factor"))
    ranks = ranks_of(config.get("rank_pattern") or {}, r, draft.paths)
    scales, served, held = {}, 0, 0
    for path, own in ranks.items():
        linear = spec.linears[path]
        m, n = linear.out_features, linear.in_features
        check_rank(path, own, limits)
        scale = alpha_of(config.get("alpha_pattern") or {}, a, path)
        check_scale(path, scale / own, f"alpha {scale:g}, rank {own}", "alpha", limits)
        scales[path] = scale / own
        sides, total = sides_of(m, n, own, both, factor), 1
        for which, (height, width, low) in enumerate(sides, start=1):
            if low:
                draft.promise(path, f"lokr_w{which}_a", height, own, why=f" for rank {own}")
                draft.promise(path, f"lokr_w{which}_b", own, width, why=f" for rank {own}")
            else:
                draft.promise(path, f"lokr_w{which}", height, width)
            total *= own if low else min(height, width)
        as_lora = is_lora(total, m, n)
        served = max(served, total if as_lora else 0)
        held += total * (m + n) if as_lora else m * n + (m if linear.bias else 0)
    fields = {"decompose_both": both, "decompose_factor": factor, "scales": scales}
    return draft.close("lokr", served, held, r=r, ranks=ranks, **fields)


def is_lora(rank: int, m: int, n: int) -> bool:
    """Is this rank cheaper than a private matrix?"""
    return rank * (m + n) < m * n


def sides_of(
    m: int, n: int, rank: int, both: bool, factor: int
) -> tuple[tuple[int, int, bool], tuple[int, int, bool]]:
    """Height and width of w1 and w2, and whether each is of low rank (PEFT's `update_layer`)."""
    (l1, l2), (w1, w2) = factorization(m, factor), factorization(n, factor)
    return (
        (l1, w1, both and rank < max(l1, w1) / 2),
        (l2, w2, rank < max(l2, w2) / 2),
    )


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`, the smaller first: LyCORIS' own rule."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small, large = 1, size
    while small < large:
        following = next(d for d in range(small + 1, size + 1) if size % d == 0)
        if following + size // following > small + large or following > limit:
            break
        small, large = following, size // following
    return min(small, large), max(small, large)
