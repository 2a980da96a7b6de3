"""C3A: an update of circulant blocks, each given by one row.

Chen et al. 2024, "Parameter-Efficient Fine-Tuning via Circular Convolution".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.checks.modules import older_pattern, private
from adapters.config_rules import COMMON, LAYERS, Rule, count, ignore, one_of, pattern, present
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    "block_size": count,
    "block_size_pattern": pattern(count),
    "init_weights": ignore,  # the file holds them
    "bias": one_of("none"),
}


def check_c3a(config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # no rank, no scale
    draft = Draft("C3A", config, RULES, header, spec)
    default = int(present(config, "block_size"))
    sizes = older_pattern(config.get("block_size_pattern") or {}, default, draft.paths)
    for path, size in sizes.items():
        m, n = spec.linears[path].out_features, spec.linears[path].in_features
        if m % size or n % size:
            raise InvalidAdapter(
                f"{size} divides not both sides of {path}, [{m}, {n}]", "block_size"
            )
        draft.promise(path, "c3a_kernel", m // size, n // size, size, why=f" for blocks of {size}")
    patterns = {path: size for path, size in sizes.items() if size != default}
    fields = {"block_size": default, "block_size_pattern": patterns}
    return draft.close("c3a", 0, private(draft.paths, spec), **fields)
