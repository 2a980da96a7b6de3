"""Which tensors a LoRA config promises on a given base, and whether the file keeps the promise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.checked import numbers
from adapters.checks.token_rows import (
    TokenRows,
    optional_rows,
    promised_rows,
    resolve_indices,
    rows_bytes,
)
from adapters.config_schema import LoraFields
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.promises import PREFIX, Expected, consume, whole_module
from adapters.ranks import alpha_of, check_rank, check_scale
from adapters.safetensors_header import TensorEntry
from adapters.targets import matching, modules_of
from base.spec import BaseSpec

ROWS_LEAF = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """Every tensor of the file by name, and the rank and alpha of every low-rank target."""

    tensors: Mapping[str, Expected]
    ranks: Mapping[str, int]  # module path -> r
    alphas: Mapping[str, float]
    saved: tuple[str, ...]  # module paths that the adapter replaces whole
    rows: TokenRows = field(default_factory=dict)  # tokens with rows of their own

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that the adapter touches, sorted."""
        return tuple(sorted({*(expected.module for expected in self.tensors.values()), *self.rows}))

    def memory_bytes(self, spec: BaseSpec) -> int:
        """What it takes once lowered, in fp32."""
        rows = numbers(self.tensors, "rows")
        return 4 * (numbers(self.tensors) - rows) + sum(rows_bytes(self.rows, spec))


def match_lora(
    fields: LoraFields, tensors: Mapping[str, TensorEntry], spec: BaseSpec, limits: Limits
) -> LoraLayout:
    """Match the tensors of a file with what the config promises, both ways.

    A string `target_modules` and the keys of the patterns are regular expressions of the user:
    call this only where time is bounded (`validate_in_child`). The layout holds plain paths only.

    Raises InvalidAdapter or TooLarge, naming the tensor or the field.
    """
    targets, saved = modules_of(fields, spec)
    wrong = next((path for path in targets if path in spec.norms), None)
    if wrong:
        raise InvalidAdapter(f"{wrong} is a norm: LoRA wants linears", "target_modules")
    if fields.invocation:
        _check_activated(fields, targets, saved, spec)
    ranks = {path: (matching(fields.rank_pattern, path) or [fields.r])[0] for path in targets}
    alphas = {path: alpha_of(fields.alpha_pattern, fields.alpha, path) for path in targets}
    for path, rank in ranks.items():
        check_rank(path, rank, limits)
        scale = alphas[path] / (math.sqrt(rank) if fields.use_rslora else rank)
        check_scale(path, scale, f"alpha {alphas[path]:g}, rank {rank}", "lora_alpha", limits)
    rows = _token_rows(fields, spec, ranks.keys() | saved)
    promised = {
        **dict(_promised(fields, spec, ranks, saved)),
        **promised_rows(rows, spec, ROWS_LEAF),
    }
    found = consume(tensors, promised, spec, targets, optional_rows(rows, spec, ROWS_LEAF))
    return LoraLayout(found, ranks, alphas, tuple(sorted(saved)), rows)


def _check_activated(
    fields: LoraFields, targets: list[str], saved: set[str], spec: BaseSpec
) -> None:
    where = "alora_invocation_tokens"
    other = next((path for path in [*targets, *sorted(saved)] if path not in spec.linears), None)
    if other or saved:
        raise InvalidAdapter(
            f"an activated LoRA adapts linears alone, and {other or min(saved)} would differ "
            "before its invocation too",
            where,
        )
    beyond = next((t for t in fields.invocation if t >= spec.vocab_size), None)
    if beyond is not None:
        raise InvalidAdapter(f"token {beyond}: this base knows {spec.vocab_size}", where)


def _token_rows(fields: LoraFields, spec: BaseSpec, others: set[str]) -> TokenRows:
    where = "trainable_token_indices"
    rows = resolve_indices(fields.trainable_token_indices, spec, fields.ensure_weight_tying, where)
    both = sorted(others.intersection(rows))
    if both:
        raise InvalidAdapter(
            f"{both[0]} has rows of its own for some tokens, and is a target or a saved module "
            "too: name it in one place",
            where,
        )
    return rows


def canonical_config(fields: LoraFields, layout: LoraLayout) -> dict[str, Any]:
    """The config with every pattern resolved to module paths, defaults filled in, the rest dropped.

    It is still a valid PEFT config, and two configs that mean the same give the same one. Look the
    ranks up by exact path: `rank_pattern.get(path, r)`, `alpha_pattern.get(path, lora_alpha)`.
    """
    rows = {path: list(tokens) for path, tokens in layout.rows.items()}
    return {
        "peft_type": "LORA",
        "r": fields.r,
        "lora_alpha": fields.alpha,
        "target_modules": sorted(layout.ranks),
        "rank_pattern": _differing(layout.ranks, fields.r),
        "alpha_pattern": _differing(layout.alphas, fields.alpha),
        "modules_to_save": list(layout.saved) or None,
        "bias": fields.bias,
        "use_rslora": fields.use_rslora,
        "use_dora": fields.use_dora,
        "lora_bias": fields.lora_bias,
        # Only where there are some: the digests of all other adapters stay what they were.
        **({"trainable_token_indices": rows} if rows else {}),
        **({"alora_invocation_tokens": list(fields.invocation)} if fields.invocation else {}),
    }


def _differing(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    return {path: value for path, value in sorted(values.items()) if value != default}


def _promised(
    fields: LoraFields, spec: BaseSpec, ranks: Mapping[str, int], saved: set[str]
) -> Iterator[tuple[str, Expected]]:
    for path, rank in ranks.items():
        yield from _low_rank(fields, spec, path, rank)
    for path in saved:
        yield from whole_module(spec, path)
    for path, linear in spec.linears.items():
        if linear.bias and path not in saved and _bias_is_saved(fields, path in ranks):
            name = f"{path}.base_layer.bias" if path in ranks else f"{path}.bias"
            yield PREFIX + name, Expected(path, (linear.out_features,), "bias")


def _bias_is_saved(fields: LoraFields, targeted: bool) -> bool:
    return fields.bias == "all" or (fields.bias == "lora_only" and targeted)


def _low_rank(
    fields: LoraFields, spec: BaseSpec, path: str, rank: int
) -> Iterator[tuple[str, Expected]]:
    why = f" for rank {rank}"
    start = f"{PREFIX}{path}."
    if path in spec.embeddings:
        table = spec.embeddings[path]
        if fields.lora_bias:
            raise InvalidAdapter(f"PEFT has no lora_bias for the embedding {path}", "lora_bias")
        out = table.width
        yield start + "lora_embedding_A", Expected(path, (rank, table.rows), "A", why)
        yield start + "lora_embedding_B", Expected(path, (out, rank), "B", why)
    else:
        linear = spec.linears[path]
        out = linear.out_features
        yield start + "lora_A.weight", Expected(path, (rank, linear.in_features), "A", why)
        yield start + "lora_B.weight", Expected(path, (out, rank), "B", why)
        if fields.lora_bias:
            yield start + "lora_B.bias", Expected(path, (out,), "lora_bias")
    if fields.use_dora:
        # An embedding's magnitude is per column of the table [rows, width], so [width] as well.
        yield start + "lora_magnitude_vector", Expected(path, (out,), "magnitude")
