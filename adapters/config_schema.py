"""The strict schema of a LoRA `adapter_config.json`, as PEFT 0.21 writes it.

Every field has one rule: it is *honoured*, it is *harmless* (it cannot change what the adapter
computes at inference), or it is *refused* when it is set. A field without a rule is refused unless
it is null. User JSON never reaches a PeftConfig: some of its fields import modules or open files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.checks.token_rows import token_indices
from adapters.config_rules import (
    COMMON,
    FAN_IN,
    LAYERS,
    Rule,
    alpha,
    apply_rules,
    flag,
    ignore,
    one_of,
    pattern,
    present,
    rank,
    refuse,
    target_fields,
    targets,
)
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.safetensors_header import parse_json_object
from base.spec import BaseSpec

MAX_INVOCATION = 1024
SHA256 = re.compile(r"[0-9a-f]{64}")

# How A and B begin does not matter once they are trained, as long as W itself was left alone.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

HARMLESS = {
    "lora_dropout",  # off at inference
    "eva_config",  # these parametrise an initialisation, and init_lora_weights names that
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}

REFUSED = {
    "layer_replication": "a stack of repeated layers is another base",
    "megatron_config": "Megatron's parallel layers are not served",
    "target_parameters": "LoRA on bare parameters is not served; use target_modules",
    "use_qalora": "QALoRA is not served",
    "monteclora_config": "MonteCLoRA samples its weights and is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "arrow_config": "Arrow routing is not served",
    "kasa_config": "KaSA changes the base's weights and is not served",
    "velora_config": "VeLoRA is not served",
}


@dataclass(frozen=True, slots=True)
class LoraFields:
    """The honoured fields, checked for type and range; patterns still as the user wrote them."""

    r: int
    alpha: float
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    bias: str
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    ensure_weight_tying: bool
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    invocation: tuple[int, ...] = ()  # an activated LoRA's

    @property
    def kind(self) -> str:
        if self.invocation:
            return "alora"
        return "dora" if self.use_dora else "rslora" if self.use_rslora else "lora"


def read_config(raw: bytes) -> dict[str, Any]:
    """The JSON object of an adapter_config.json. Raises InvalidAdapter."""
    return parse_json_object(raw, "config", "adapter_config.json")


def check_fingerprint(
    config: Mapping[str, Any], metadata: Mapping[str, str], spec: BaseSpec
) -> None:
    """Refuse an adapter that says itself that it was trained on another base.

    It is said in the config, `{"nibble": {"base_fingerprint": <64 hex digits>}}`, which PEFT
    ignores, or in the weights' metadata, `base_fingerprint`, where `nibble train` writes it.
    """
    mark = config.get("nibble")
    if mark is not None:
        if not isinstance(mark, dict) or set(mark) != {"base_fingerprint"}:
            raise InvalidAdapter("must be {'base_fingerprint': <sha-256>}", "nibble")
        _check_mark(mark["base_fingerprint"], spec, "nibble.base_fingerprint")
    if "base_fingerprint" in metadata:
        _check_mark(metadata["base_fingerprint"], spec, "metadata.base_fingerprint")


def _check_mark(found: Any, spec: BaseSpec, where: str) -> None:
    if not isinstance(found, str) or not SHA256.fullmatch(found):
        raise InvalidAdapter("must be 64 lower-case hexadecimal digits", where)
    if (why := other_base(found, spec)) is not None:
        raise InvalidAdapter(why, where)


def other_base(fingerprint: str, spec: BaseSpec) -> str | None:
    """What is wrong with an adapter for the base `fingerprint` over the base `spec`; None where
    they are the same."""
    if fingerprint == spec.fingerprint:
        return None
    if fingerprint != spec.twin:
        return f"the adapter was made for the base {fingerprint}, this one is {spec.fingerprint}"
    return other_scales(spec.id, spec.double_quant)


def other_scales(base: str, double_quant: bool, stored: int | None = None) -> str:
    """Why what was made for a base with its scales otherwise is refused, and what to do: one
    adapter, or so many `stored` ones."""
    which = "the adapter was"
    if stored is not None:
        which = f"{stored} stored adapter{' was' if stored == 1 else 's were'}"
    made, here = ("without", "with") if double_quant else ("with", "without")
    flag = "--no-double-quant" if double_quant else "--double-quant"
    setting = "false" if double_quant else "true"
    return (
        f"{which} made for {base} {made} double quantisation, and it is loaded {here} it: give "
        f"`{flag}` (double_quant={setting}) here, or train anew"
    )


def lora_fields(config: Mapping[str, Any], limits: Limits) -> LoraFields:
    """Check every field of a LoRA config. Raises InvalidAdapter naming the field."""
    apply_rules(config, RULES)
    chosen = target_fields(config)
    fields = LoraFields(
        r=present(config, "r"),
        alpha=float(present(config, "lora_alpha")),
        target_modules=chosen.target_modules,
        exclude_modules=chosen.exclude_modules,
        modules_to_save=chosen.modules_to_save,
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        layers_to_transform=chosen.layers_to_transform,
        layers_pattern=chosen.layers_pattern,
        bias=config.get("bias") or "none",
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        lora_bias=bool(config.get("lora_bias")),
        ensure_weight_tying=chosen.ensure_weight_tying,
        trainable_token_indices=config.get("trainable_token_indices") or (),
        invocation=tuple(config.get("alora_invocation_tokens") or ()),
    )
    if fields.lora_bias and fields.use_dora:
        raise InvalidAdapter("cannot be combined with use_dora", "lora_bias")
    if fields.invocation:
        _check_activated(fields)
    return fields


def _check_activated(fields: LoraFields) -> None:
    """An activated LoRA is nothing but factors: all else would hold before its invocation too."""
    for name, other in (
        ("use_dora", fields.use_dora),
        ("modules_to_save", fields.modules_to_save),
        ("trainable_token_indices", fields.trainable_token_indices),
        ("bias", fields.bias != "none"),
    ):
        if other:
            raise InvalidAdapter(
                "beside alora_invocation_tokens: before its invocation the base's weights hold, "
                "and this would change those",
                name,
            )


def invocation(name: str, value: Any) -> None:
    """The tokens from whose last place in the prompt on an activated LoRA adds something."""
    if value is None:
        return
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_INVOCATION:
        found = f"{len(value)} tokens" if isinstance(value, list) else str(value)[:80]
        raise InvalidAdapter(f"{found}, expected a list of 1 to {MAX_INVOCATION} token ids", name)
    for token in value:
        if type(token) is not int or token < 0:
            raise InvalidAdapter(f"{str(token)[:80]}, expected token ids from 0", name)


# One rule per field ---------------------------------------------------------------------------


def init(name: str, value: Any) -> None:
    """How A and B began: harmless unless the base's own weights were changed as well."""
    if value is None or isinstance(value, bool):
        return
    method = str(value).lower()
    if method.startswith(RESIDUAL_INITS):
        raise InvalidAdapter(
            f"{str(value)[:80]!r} changes the base's weights, so these tensors fit no other base: "
            "save with path_initial_model_for_weight_conversion to get a plain LoRA",
            name,
        )
    if method not in PLAIN_INITS:
        raise InvalidAdapter(
            f"{str(value)[:80]!r}, expected true, false or one of {', '.join(PLAIN_INITS)}", name
        )


RULES: Mapping[str, Rule] = {
    **COMMON,
    **LAYERS,
    **FAN_IN,
    **dict.fromkeys(HARMLESS, ignore),
    **{name: refuse(reason) for name, reason in REFUSED.items()},
    "r": rank,
    "lora_alpha": alpha,
    "rank_pattern": pattern(rank),
    "alpha_pattern": pattern(alpha),
    "exclude_modules": targets,
    "bias": one_of("none", "all", "lora_only"),
    "use_rslora": flag,
    "use_dora": flag,
    "lora_bias": flag,
    "ensure_weight_tying": flag,
    "trainable_token_indices": token_indices,
    "alora_invocation_tokens": invocation,
    "init_lora_weights": init,
}
