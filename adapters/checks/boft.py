"""BOFT: OFT by butterfly factors, between which the columns are dealt anew; and a gain by rows.

Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.amounts import count
from adapters.checks.draft import Draft
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
    Rule,
    flag,
    ignore,
    one_of,
    present,
    targets,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import PREFIX
from adapters.safetensors_header import Header
from base.spec import BaseSpec

MAX_BLOCK = 1 << 16

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "boft_block_size": count(0, MAX_BLOCK),
    "boft_block_num": count(0, MAX_BLOCK),
    "boft_n_butterfly_factor": count(1, 16),
    "exclude_modules": targets,
    "boft_dropout": ignore,  # off at inference
    "init_weights": flag,  # the file holds them
    "bias": one_of("none"),
}


def check_boft(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # no rank, no scale
    draft = Draft("BOFT", config, RULES, header, spec)
    size, number = present(config, "boft_block_size"), present(config, "boft_block_num")
    if (size == 0) == (number == 0):
        reason = f"{size} with boft_block_num {number}: one of the two must be 0"
        raise InvalidAdapter(reason, "boft_block_size")
    factors = _factors(present(config, "boft_n_butterfly_factor"), header, draft.paths[0])
    held, widths = 0, set()
    for path in draft.paths:
        linear = spec.linears[path]
        own = _block_size(path, linear.in_features, size, number, factors)
        blocks = linear.in_features // own
        why = f" for blocks of {own}"
        draft.promise(path, "boft_R", factors, blocks, own, own, why=why)
        draft.promise(path, "boft_s", linear.out_features, 1, role="vector")
        held += factors * linear.in_features * own + linear.out_features
        widths.add((linear.in_features, own))
    held += (factors - 1) * sum(width for width, _ in widths)  # the orders of columns
    sizes = {"boft_block_size": size, "boft_block_num": number}
    return draft.close("boft", 0, held, **sizes, boft_n_butterfly_factor=factors)


def _factors(wanted: int, header: Header, path: str) -> int:
    """PEFT trains one factor, whatever the config says, where its CUDA extension is not built."""
    entry = header.tensors.get(f"{PREFIX}{path}.boft_R")
    return 1 if entry is not None and entry.shape[0] == 1 else wanted


def _block_size(path: str, width: int, size: int, number: int, factors: int) -> int:
    where = "boft_block_size" if size else "boft_block_num"
    wanted = size or number
    if width % wanted:
        raise InvalidAdapter(f"{wanted} divides not {width}, the input of {path}", where)
    own = size or width // number
    groups = 1 << (factors - 1)  # blocks that the last factor mixes
    if factors > 1 and (own % 2 or (width // own) % groups):
        raise InvalidAdapter(
            f"{factors} with {width // own} blocks of {own} for {path}: the blocks must be even, "
            f"and their number a multiple of {groups}",
            "boft_n_butterfly_factor",
        )
    return own
