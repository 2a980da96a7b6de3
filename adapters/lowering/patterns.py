"""rank_pattern and alpha_pattern: PEFT's matching rule, for patterns that cannot run for ever."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapters.errors import InvalidAdapter

_LONGEST = 256
_MOST_REPEATS = 4
_NESTED = re.compile(r"\)\s*[*+?{]|[*+?}][*+{]")  # (a+)+, a++, a*{9}: what can explode
_REPEAT = re.compile(r"[*+{]")


def pattern_value(patterns: Mapping[str, Any], path: str, default: float, field: str) -> float:
    """The value for a module path: the first key that matches its end wins, else `default`.

    The rule of peft.utils.other.get_pattern_key: a key is a regular expression for the whole path
    or for its end after a dot. Keys come from an upload, so what could backtrack without end is
    refused. Raises InvalidAdapter, naming `field`.
    """
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({_bounded(key, field)})$", path):
            return _number(value, key, field)
    return default


def _bounded(key: str, field: str) -> str:
    repeats = len(_REPEAT.findall(key))
    if len(key) > _LONGEST or repeats > _MOST_REPEATS or _NESTED.search(key):
        raise InvalidAdapter(
            f"pattern {key[:80]!r} is too complex: at most {_LONGEST} characters and "
            f"{_MOST_REPEATS} repeats, none of them repeated again",
            field,
        )
    try:
        re.compile(key)
    except re.error as error:
        raise InvalidAdapter(f"pattern {key!r} is no regular expression: {error}", field) from None
    return key


def _number(value: Any, key: str, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidAdapter(f"{key!r} must map to a number, got {value!r}", field)
    return value
