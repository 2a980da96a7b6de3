"""OFT: blocks of the input are turned, each by a small matrix near a rotation.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapters.block_sizes import oft_block_size
from adapters.checked import Checked
from adapters.checks.amounts import count, factor
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
from adapters.safetensors_header import Header
from base.spec import BaseSpec

MAX_BLOCK = 1 << 16
MAX_TERMS = 64  # of the series, each of which is a product when it is lowered
SERIES_SINCE = (0, 18)  # the PEFT whose Cayley-Neumann series is today's

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "r": count(0, MAX_BLOCK),
    "oft_block_size": count(0, MAX_BLOCK),
    "exclude_modules": targets,
    "block_share": flag,
    "coft": flag,
    "eps": factor,
    "use_cayley_neumann": flag,
    "num_cayley_neumann_terms": count(1, MAX_TERMS),
    "module_dropout": ignore,  # off at inference
    "init_weights": flag,  # the file holds them
    "bias": one_of("none"),
}


def check_oft(config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # no rank, no scale
    draft = Draft("OFT", config, RULES, header, spec)
    r, size = present(config, "r"), present(config, "oft_block_size")
    if (r == 0) == (size == 0):
        raise InvalidAdapter(f"{size} with r {r}: one of the two must be 0", "oft_block_size")
    shared = bool(config.get("block_share"))
    held = 0
    for path in draft.paths:
        width = spec.linears[path].in_features
        own = oft_block_size(width, r, size)
        if own == 1:
            where = "r" if r else "oft_block_size"
            raise InvalidAdapter(f"leaves blocks of 1 for {path}, which cannot turn", where)
        blocks = 1 if shared else width // own
        why = f" for blocks of {own}"
        draft.promise(path, "oft_R.weight", blocks, own * (own - 1) // 2, why=why)
        held += blocks * own * own
    series = _series(config)
    coft = bool(config.get("coft"))
    return draft.close(
        "oft",
        0,
        held,
        r=r,
        oft_block_size=size,
        block_share=shared,
        eps=float(present(config, "eps")) if coft else None,
        num_cayley_neumann_terms=series,
    )


def _series(config: Mapping[str, Any]) -> int | None:
    """How many terms stand for the Cayley transform; None for the transform itself."""
    if not present(config, "use_cayley_neumann"):
        return None
    version = str(config.get("peft_version") or "")
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < SERIES_SINCE:
        # PEFT names its version in the config since that very release.
        raise InvalidAdapter(
            f"{version[:40]!r}: PEFT before 0.18 trained with another Cayley-Neumann series, so "
            "these numbers mean something else now; train it again, or without use_cayley_neumann",
            "peft_version",
        )
    return int(present(config, "num_cayley_neumann_terms"))
