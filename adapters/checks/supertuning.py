"""Super-Tuning: the largest or smallest numbers of the weight are trained, beside a LoRA.

PEFT's `SupertuningConfig` describes it; the file says which numbers they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapters.checked import Checked
from adapters.checks.draft import Draft
from adapters.config_rules import COMMON, Rule, alpha, flag, ignore, present, rank
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import PREFIX
from adapters.ranks import check_rank, check_scale
from adapters.safetensors_header import Header
from base.spec import BaseSpec


def _share(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise InvalidAdapter(f"{str(value)[:80]}, expected a number from 0 to below 1", name)


def _kept(name: str, value: Any) -> None:
    flag(name, value)
    if value is False:
        raise InvalidAdapter(
            "the places would be chosen anew by the size of the base's weights, which NF4 has "
            "rounded: save with save_precomputed_indices",
            name,
        )


def _or_none(rule: Rule) -> Rule:
    return lambda name, value: None if value is None else rule(name, value)


RULES: Mapping[str, Rule] = {
    **COMMON,
    "sparsity": _share,
    "r": _or_none(rank),
    "lora_alpha": _or_none(alpha),
    "save_precomputed_indices": _kept,
    "select_top": ignore,  # the file says which numbers were selected
    "lora_dropout": ignore,  # off at inference
    "init_weights": ignore,
}


def check_supertuning(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("Super-Tuning", config, RULES, header, spec)
    sparsity, r = float(present(config, "sparsity")), int(config.get("r") or 0)
    a = float(config.get("lora_alpha") or 2 * r)
    if r:
        check_rank("every target", r, limits)
        check_scale("every target", a / r, f"alpha {a:g}, rank {r}", "lora_alpha", limits)
    held, places = 0, {}
    for path in draft.paths:
        m, n = spec.linears[path].out_features, spec.linears[path].in_features
        entries = int(m * n * (1 - sparsity))
        if not entries:
            raise InvalidAdapter(f"{sparsity:g} leaves none of the {m * n} of {path}", "sparsity")
        draft.promise(path, "supertuning_values", entries, role="vector")
        draft.promise(path, "supertuning_indices", entries, role="indices")
        places[f"{PREFIX}{path}.supertuning_indices"] = (m * n,)
        if r:
            draft.promise(path, "supertuning_lora_A.weight", r, n, why=f" for rank {r}")
            draft.promise(path, "supertuning_lora_B.weight", m, r, why=f" for rank {r}")
        held += 2 * entries + m + 1 + r * (m + n)
    checked = draft.close("supertuning", r, held, r=r, lora_alpha=a, sparsity=sparsity)
    return replace(checked, indices=places)
