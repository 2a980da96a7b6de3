"""WaveFT: a few coefficients of the update's wavelet transform, at places drawn from a seed.

Bilican et al. 2025, "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.checks.modules import private
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
    Rule,
    alpha,
    count,
    flag,
    ignore,
    one_of,
    pattern,
    present,
    seed,
    targets,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.ranks import check_scale, ranks_of
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "n_frequency": count,
    "n_frequency_pattern": pattern(count),
    "proportional_parameters": flag,
    "scaling": alpha,
    "use_idwt": flag,
    "wavelet_family": one_of("db1"),  # Haar's: the other filters are not implemented
    "random_loc_seed": seed,
    "exclude_modules": targets,
    "init_weights": ignore,  # the file holds them
    "bias": one_of("none"),
}


def check_waveft(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("WaveFT", config, RULES, header, spec)
    default, scale = int(present(config, "n_frequency")), float(present(config, "scaling"))
    check_scale("every target", scale, "scaling", "scaling", limits)
    sizes = {p: spec.linears[p].out_features * spec.linears[p].in_features for p in draft.paths}
    if config.get("proportional_parameters"):
        budget, total = default * len(sizes), sum(sizes.values())
        counts = {path: max(1, round(size / total * budget)) for path, size in sizes.items()}
    else:
        counts = ranks_of(config.get("n_frequency_pattern") or {}, default, draft.paths)
    for path, own in counts.items():
        if own > sizes[path]:
            raise InvalidAdapter(f"{own} coefficients for {path}, {sizes[path]}", "n_frequency")
        draft.promise(path, "waveft_spectrum", own, role="vector")
    fields = {
        "counts": counts,
        "scaling": scale,
        "use_idwt": bool(present(config, "use_idwt")),
        "wavelet_family": present(config, "wavelet_family"),
        "random_loc_seed": int(present(config, "random_loc_seed")),
    }
    return draft.close("waveft", 0, private(draft.paths, spec), **fields)
