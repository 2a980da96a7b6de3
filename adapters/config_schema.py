"""The strict schema of a LoRA `adapter_config.json`, as PEFT 0.21 writes it.

Every field has one rule: it is *honoured*, it is *harmless* (it cannot change what the adapter
computes at inference), or it is *refused* when it is set. A field without a rule is refused unless
it is null. User JSON never reaches a PeftConfig: some of its fields import modules or open files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.safetensors_header import parse_json_object

MAX_PATTERNS = 4096
MAX_REGEX = 1024
PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
SHA256 = re.compile(r"[0-9a-f]{64}")

# How A and B begin does not matter once they are trained, as long as W itself was left alone.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

HARMLESS = {
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",  # off at inference
    "auto_mapping",  # names a Python class: never imported here
    "eva_config",  # these parametrise an initialisation, and init_lora_weights names that
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}

REFUSED = {
    "fan_in_fan_out": "weights stored as [in, out] are not served",
    "layer_replication": "a stack of repeated layers is another base",
    "megatron_config": "Megatron's parallel layers are not served",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not served",
    "trainable_token_indices": "trainable tokens are not served; use modules_to_save",
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

    @property
    def kind(self) -> str:
        return "dora" if self.use_dora else "rslora" if self.use_rslora else "lora"


def read_config(raw: bytes) -> dict[str, Any]:
    """The JSON object of an adapter_config.json. Raises InvalidAdapter."""
    return parse_json_object(raw, "config", "adapter_config.json")


def check_fingerprint(config: Mapping[str, Any], fingerprint: str) -> None:
    """Refuse an adapter whose config says that it was trained on another base.

    The mark is `{"nibble": {"base_fingerprint": <64 hex digits>}}`; PEFT ignores it.
    """
    mark = config.get("nibble")
    if mark is None:
        return
    where = "nibble.base_fingerprint"
    if not isinstance(mark, dict) or set(mark) != {"base_fingerprint"}:
        raise InvalidAdapter("must be {'base_fingerprint': <sha-256>}", "nibble")
    found = mark["base_fingerprint"]
    if not isinstance(found, str) or not SHA256.fullmatch(found):
        raise InvalidAdapter("must be 64 lower-case hexadecimal digits", where)
    if found != fingerprint:
        raise InvalidAdapter(
            f"the adapter was made for the base {found}, this server runs {fingerprint}", where
        )


def lora_fields(config: Mapping[str, Any], limits: Limits) -> LoraFields:
    """Check every field of a LoRA config. Raises InvalidAdapter naming the field."""
    for name, value in config.items():
        if name not in RULES:
            if value is not None:
                raise InvalidAdapter("unknown field: it may change what the adapter computes", name)
        else:
            RULES[name](name, value)
    names = config.get("layers_to_transform")
    fields = LoraFields(
        r=_present(config, "r"),
        alpha=float(_present(config, "lora_alpha")),
        target_modules=_names(_present(config, "target_modules")),
        exclude_modules=_names(config.get("exclude_modules")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        layers_to_transform=None if names in (None, []) else _tuple(names),
        layers_pattern=_tuple(config.get("layers_pattern") or ()),
        bias=config.get("bias") or "none",
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        lora_bias=bool(config.get("lora_bias")),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
    )
    if fields.lora_bias and fields.use_dora:
        raise InvalidAdapter("cannot be combined with use_dora", "lora_bias")
    if fields.layers_pattern and fields.layers_to_transform is None:
        raise InvalidAdapter("has no meaning without layers_to_transform", "layers_pattern")
    if isinstance(fields.target_modules, str) and fields.layers_to_transform is not None:
        raise InvalidAdapter("wants target_modules as a list of names", "layers_to_transform")
    return fields


# One rule per field ---------------------------------------------------------------------------

Rule = Callable[[str, Any], None]


def _present(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise InvalidAdapter("is missing", name)
    return config[name]


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())


def _ignore(name: str, value: Any) -> None:
    del name, value


def _refuse(name: str, value: Any) -> None:
    if value not in (None, False, [], {}):
        raise InvalidAdapter(f"{REFUSED[name]} (found {str(value)[:80]})", name)


def _flag(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise InvalidAdapter(f"{str(value)[:80]!r}, expected true or false", name)


def _rank(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise InvalidAdapter(f"rank {str(value)[:80]}, expected an integer from 1", name)


def _alpha(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value == 0:
        raise InvalidAdapter(f"alpha {str(value)[:80]}, expected a finite number but 0", name)


def _pattern(check: Rule) -> Rule:
    def rule(name: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            raise InvalidAdapter(f"expected an object of at most {MAX_PATTERNS} entries", name)
        for key, number in value.items():
            _regex(name, key)
            check(f"{name}[{key[:80]!r}]", number)

    return rule


def _regex(name: str, value: str) -> None:
    if not value or len(value) > MAX_REGEX:
        raise InvalidAdapter(f"a pattern must have 1 to {MAX_REGEX} characters", name)
    if PLAIN_NAME.fullmatch(value):
        return
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise InvalidAdapter(
            f"{value[:80]!r} is not a regular expression: {error}", name
        ) from error


def _targets(name: str, value: Any) -> None:
    if isinstance(value, str):
        _regex(name, value)
    elif value is not None:
        _plain_names(name, value)


def _plain_names(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list) or len(value) > MAX_PATTERNS:
        raise InvalidAdapter(f"expected a list of at most {MAX_PATTERNS} module names", name)
    for item in value:
        if not isinstance(item, str) or len(item) > MAX_REGEX or not PLAIN_NAME.fullmatch(item):
            raise InvalidAdapter(f"{str(item)[:80]!r} is not a module name", name)


def _layer_names(name: str, value: Any) -> None:
    _plain_names(name, [value] if isinstance(value, str) and value else value or None)


def _layer_numbers(name: str, value: Any) -> None:
    numbers = [value] if type(value) is int else value
    if numbers is not None and not (
        isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
    ):
        raise InvalidAdapter(f"{str(value)[:80]}, expected layer numbers from 0", name)


def _bias(name: str, value: Any) -> None:
    if value not in (None, "none", "all", "lora_only"):
        raise InvalidAdapter(f"{str(value)[:80]!r}, expected 'none', 'all' or 'lora_only'", name)


def _task(name: str, value: Any) -> None:
    if value not in (None, "CAUSAL_LM"):
        raise InvalidAdapter(f"{str(value)[:80]!r}, only 'CAUSAL_LM' is served", name)


def _init(name: str, value: Any) -> None:
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
    **dict.fromkeys(HARMLESS, _ignore),
    **dict.fromkeys(REFUSED, _refuse),
    "peft_type": _ignore,  # chose this schema
    "nibble": _ignore,  # see check_fingerprint
    "task_type": _task,
    "r": _rank,
    "lora_alpha": _alpha,
    "rank_pattern": _pattern(_rank),
    "alpha_pattern": _pattern(_alpha),
    "target_modules": _targets,
    "exclude_modules": _targets,
    "modules_to_save": _plain_names,
    "layers_to_transform": _layer_numbers,
    "layers_pattern": _layer_names,
    "bias": _bias,
    "use_rslora": _flag,
    "use_dora": _flag,
    "lora_bias": _flag,
    "ensure_weight_tying": _flag,
    "init_lora_weights": _init,
}
