"""LN tuning: norms trained whole.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.checks.modules import norms_of
from adapters.config_rules import COMMON, Rule, targets
from adapters.limits import Limits
from adapters.safetensors_header import Header
from base.spec import BaseSpec

RULES: Mapping[str, Rule] = {**COMMON, "exclude_modules": targets}


def check_ln_tuning(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # no rank, no scale
    draft = Draft("LN tuning", config, RULES, header, spec, norms_of)
    for path in draft.paths:
        draft.promise(path, "ln_tuning_layers.weight", spec.norms[path], role="saved")
    return draft.close("ln_tuning", 0)
