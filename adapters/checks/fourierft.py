"""FourierFT: a few coefficients of the update's Fourier transform, at places drawn from a seed.

Gao et al. 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.checks.modules import older_pattern, private
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
    Rule,
    alpha,
    count,
    ignore,
    one_of,
    pattern,
    present,
    seed,
    targets,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.ranks import check_scale
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    "n_frequency": count,
    "n_frequency_pattern": pattern(count),
    "scaling": alpha,
    "random_loc_seed": seed,
    "exclude_modules": targets,
    "init_weights": ignore,  # the file holds them
    "bias": one_of("none"),
}


def check_fourierft(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("FourierFT", config, RULES, header, spec)
    default, scale = int(present(config, "n_frequency")), float(present(config, "scaling"))
    check_scale("every target", scale, "scaling", "scaling", limits)
    counts = older_pattern(config.get("n_frequency_pattern") or {}, default, draft.paths)
    for path, own in counts.items():
        m, n = spec.linears[path].out_features, spec.linears[path].in_features
        if own > m * n:
            raise InvalidAdapter(f"{own} coefficients for {path}, [{m}, {n}]", "n_frequency")
        draft.promise(path, "fourierft_spectrum", own, role="vector")
    fields = {
        "n_frequency": default,
        "n_frequency_pattern": {path: own for path, own in counts.items() if own != default},
        "scaling": scale,
        "random_loc_seed": int(present(config, "random_loc_seed")),
    }
    return draft.close("fourierft", 0, private(draft.paths, spec), **fields)
