"""SHiRA: a few numbers of the weight are trained, where the file says.

Bhardwaj et al. 2024, "Sparse High Rank Adapters".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.config_rules import COMMON, FAN_IN, Rule, flag, ignore, present, rank
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import PREFIX
from adapters.ranks import check_rank
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **FAN_IN,
    "r": rank,
    # Which numbers are trained stands in the file, however it was chosen.
    "mask_type": ignore,
    "random_seed": ignore,
    "init_weights": flag,
}


def check_shira(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("SHiRA", config, RULES, header, spec)
    r = int(present(config, "r"))
    check_rank("every target", r, limits)
    held, places = 0, {}
    for path in draft.paths:
        linear = spec.linears[path]
        entries = r * (linear.in_features + linear.out_features)
        if entries > linear.in_features * linear.out_features:
            raise InvalidAdapter(f"{r} trains more numbers than {path} has", "r")
        draft.promise(path, "shira_weight", entries, role="vector", why=f" for r {r}")
        why = f" for r {r}: without it nothing says which numbers were trained"
        draft.promise(path, "shira_indices", 2, entries, role="indices", why=why)
        places[f"{PREFIX}{path}.shira_indices"] = (linear.out_features, linear.in_features)
        held += 2 * entries + linear.out_features + 1
    return replace(draft.close("shira", 0, held, r=r), indices=places)
