"""Poly: a task mixes several LoRAs, split by split; served where the adapter knows one task.

Ponti et al. 2022, "Combining Modular Skills in Multitask Learning".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked
from adapters.checks.amounts import count
from adapters.checks.draft import Draft
from adapters.config_rules import COMMON, Rule, flag, one_of, present, rank, targets
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.ranks import check_rank
from adapters.safetensors_header import Header
from base.spec import BaseSpec


def _one_task(name: str, value: Any) -> None:
    if value != 1 or type(value) is not int:
        raise InvalidAdapter(
            f"{str(value)[:80]}: a request cannot say which task it is, so 1 is served; to serve "
            "one of several, keep its row of each module_logits and set this to 1",
            name,
        )


RULES: Mapping[str, Rule] = {
    **COMMON,
    "r": rank,
    "n_tasks": _one_task,
    "n_skills": count(1, 1024),
    "n_splits": count(1, 1024),
    "poly_type": one_of("poly"),
    "exclude_modules": targets,
    "init_weights": flag,  # the file holds them
}


def check_poly(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter or TooLarge, naming the tensor or the field."""
    draft = Draft("Poly", config, RULES, header, spec)
    present(config, "n_tasks")
    r, skills, splits = (int(present(config, name)) for name in ("r", "n_skills", "n_splits"))
    check_rank("every target", r, limits)
    held, why = 0, f" for {splits} splits of {skills} skills of rank {r}"
    for path in draft.paths:
        linear = spec.linears[path]
        if linear.in_features % splits or linear.out_features % splits:
            raise InvalidAdapter(
                f"{splits} divides not both sides of {path}, "
                f"[{linear.out_features}, {linear.in_features}]",
                "n_splits",
            )
        across, down = linear.in_features // splits, linear.out_features // splits
        draft.promise(path, "poly_lora_A", splits, skills, across, r, why=why)
        draft.promise(path, "poly_lora_B", splits, skills, r, down, why=why)
        draft.promise(path, "poly_router.module_logits", 1, splits * skills, role="logits")
        held += r * (linear.in_features + linear.out_features)
    return draft.close("poly", r, held, r=r, n_skills=skills, n_splits=splits, n_tasks=1)
