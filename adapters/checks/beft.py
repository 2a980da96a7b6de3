"""BEFT: a trained addition to the bias of each target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.config_rules import COMMON, Rule, flag
from adapters.limits import Limits
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {**COMMON, "init_weights": flag}


def check_beft(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # no rank, no scale
    draft = Draft("BEFT", config, RULES, header, spec)
    for path in draft.paths:
        draft.promise(path, "beft_bias", 1, spec.linears[path].out_features, role="vector")
    return draft.close("beft", 0)
