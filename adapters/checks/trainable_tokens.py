"""Trainable tokens: chosen rows of the embedding table, and of an output head that is tied to it.

PEFT's own method (`peft.tuners.trainable_tokens`): rows replace the base's, nothing is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.token_rows import (
    check_place,
    optional_rows,
    promised_rows,
    resolve_indices,
    rows_bytes,
    token_list,
)
from adapters.config_rules import COMMON, Rule, apply_rules, flag, present, refuse, target_fields
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import consume
from adapters.safetensors_header import Header
from adapters.targets import modules_of
from base.spec import BaseSpec

LEAF = "trainable_tokens_delta"

RULES: Mapping[str, Rule] = {
    **COMMON,
    "modules_to_save": refuse("PEFT has none beside trainable tokens"),
    "token_indices": token_list,
    "init_weights": flag,  # how the rows began; the file holds them
}


def check_trainable_tokens(
    config: Mapping[str, Any], header: Header, spec: BaseSpec, limits: Limits
) -> Checked:
    """Raises InvalidAdapter, naming the tensor or the field."""
    del limits  # no rank, no scale
    apply_rules(config, RULES)
    tokens = tuple(present(config, "token_indices"))
    rows = resolve_indices(
        dict.fromkeys(_targets(config, spec), tokens), spec, False, "token_indices"
    )
    promised = promised_rows(rows, spec, LEAF)
    found = consume(header.tensors, promised, spec, (), optional_rows(rows, spec, LEAF))
    return Checked(
        Validated(
            kind="trainable_tokens",
            rank=0,
            targets=tuple(rows),
            config={
                "peft_type": "TRAINABLE_TOKENS",
                "target_modules": list(rows),
                "token_indices": list(tokens),
            },
            parameters=numbers(found),
            memory_bytes=sum(rows_bytes(rows, spec)),
        )
    )


def _targets(config: Mapping[str, Any], spec: BaseSpec) -> list[str]:
    if config.get("target_modules") is None:  # PEFT takes the input embedding then
        return [next(iter(spec.embeddings))]
    paths, _ = modules_of(target_fields(config), spec)
    for path in paths:
        check_place(path, spec, "target_modules")
    both = spec.tied_embeddings and len(paths) > 1
    if both:
        raise InvalidAdapter(
            f"{' and '.join(paths)} share one tied matrix, and PEFT itself fails to run both as "
            f"targets: name {paths[0]} alone, and the other follows",
            "target_modules",
        )
    return paths
