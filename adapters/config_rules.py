"""Rules for the fields of any method's `adapter_config.json`: honoured, harmless or refused.

A field without a rule is refused unless it is null. User JSON never reaches a PeftConfig: some of
its fields import modules or open files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.errors import InvalidAdapter

MAX_PATTERNS = 4096
MAX_REGEX = 1024
PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")

Rule = Callable[[str, Any], None]


@dataclass(frozen=True, slots=True)
class TargetFields:
    """The honoured fields that choose modules, patterns still as the user wrote them."""

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    ensure_weight_tying: bool


def apply_rules(config: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Check every field of a config. Raises InvalidAdapter naming the field."""
    for name, value in config.items():
        if name in rules:
            rules[name](name, value)
        elif value is not None:
            raise InvalidAdapter("unknown field: it may change what the adapter computes", name)


def target_fields(config: Mapping[str, Any]) -> TargetFields:
    """The fields that choose modules, of a config whose rules hold. Raises InvalidAdapter."""
    numbers = config.get("layers_to_transform")
    fields = TargetFields(
        target_modules=_names(present(config, "target_modules")),
        exclude_modules=_names(config.get("exclude_modules")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        layers_to_transform=None if numbers in (None, []) else _tuple(numbers),
        layers_pattern=_tuple(config.get("layers_pattern") or ()),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
    )
    if fields.layers_pattern and fields.layers_to_transform is None:
        raise InvalidAdapter("has no meaning without layers_to_transform", "layers_pattern")
    if isinstance(fields.target_modules, str) and fields.layers_to_transform is not None:
        raise InvalidAdapter("wants target_modules as a list of names", "layers_to_transform")
    return fields


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())


def present(config: Mapping[str, Any], name: str) -> Any:
    """The value of a field that must be there. Raises InvalidAdapter naming it."""
    if config.get(name) is None:
        raise InvalidAdapter("is missing", name)
    return config[name]


def ignore(name: str, value: Any) -> None:
    """Harmless: it cannot change what the adapter computes at inference."""
    del name, value


def refuse(reason: str) -> Rule:
    """A rule for a field that is refused when it is set."""

    def rule(name: str, value: Any) -> None:
        if value not in (None, False, [], {}):
            raise InvalidAdapter(f"{reason} (found {str(value)[:80]})", name)

    return rule


def one_of(*allowed: Any) -> Rule:
    """A rule for a field with few values; null is always one of them."""

    def rule(name: str, value: Any) -> None:
        if value is not None and value not in allowed:
            expected = " or ".join(repr(choice) for choice in allowed)
            raise InvalidAdapter(f"{str(value)[:80]!r}, expected {expected}", name)

    return rule


def flag(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise InvalidAdapter(f"{str(value)[:80]!r}, expected true or false", name)


def rank(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise InvalidAdapter(f"rank {str(value)[:80]}, expected an integer from 1", name)


def count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise InvalidAdapter(f"{str(value)[:80]}, expected an integer from 1", name)


def seed(name: str, value: Any) -> None:
    """Of torch's generator."""
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 63):
        raise InvalidAdapter(f"{str(value)[:80]}, expected a number from 0 to 2^63 - 1", name)


def alpha(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value == 0:
        raise InvalidAdapter(f"alpha {str(value)[:80]}, expected a finite number but 0", name)


def pattern(check: Rule) -> Rule:
    """A rule for a table from regular expressions to values that `check` accepts."""

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


def targets(name: str, value: Any) -> None:
    if isinstance(value, str):
        _regex(name, value)
    elif value is not None:
        plain_names(name, value)


def plain_names(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list) or len(value) > MAX_PATTERNS:
        raise InvalidAdapter(f"expected a list of at most {MAX_PATTERNS} module names", name)
    for item in value:
        if not isinstance(item, str) or len(item) > MAX_REGEX or not PLAIN_NAME.fullmatch(item):
            raise InvalidAdapter(f"{str(item)[:80]!r} is not a module name", name)


def layer_names(name: str, value: Any) -> None:
    plain_names(name, [value] if isinstance(value, str) and value else value or None)


def layer_numbers(name: str, value: Any) -> None:
    numbers = [value] if type(value) is int else value
    if numbers is not None and not (
        isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
    ):
        raise InvalidAdapter(f"{str(value)[:80]}, expected layer numbers from 0", name)


def task(name: str, value: Any) -> None:
    if value not in (None, "CAUSAL_LM"):
        raise InvalidAdapter(f"{str(value)[:80]!r}, only 'CAUSAL_LM' is served", name)


# What every method's config has.
COMMON: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("peft_version", "base_model_name_or_path", "revision", "inference_mode"), ignore
    ),
    "auto_mapping": ignore,  # names a Python class: never imported here
    "peft_type": ignore,  # chose the schema
    "nibble": ignore,  # see check_fingerprint
    "task_type": task,
    "target_modules": targets,
    "modules_to_save": plain_names,
}
LAYERS: Mapping[str, Rule] = {
    "layers_to_transform": layer_numbers,
    "layers_pattern": layer_names,
}
FAN_IN: Mapping[str, Rule] = {
    "fan_in_fan_out": refuse("weights stored as [in, out] are not served"),
}
