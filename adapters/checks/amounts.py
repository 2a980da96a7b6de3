"""Rules for fields that hold a count or a factor."""

from __future__ import annotations

import math
from typing import Any

from adapters.config_rules import Rule
from adapters.errors import InvalidAdapter


def count(least: int, most: int) -> Rule:
    """A rule for an integer within bounds."""

    def rule(name: str, value: Any) -> None:
        if type(value) is not int or not least <= value <= most:
            raise InvalidAdapter(
                f"{str(value)[:80]}, expected an integer from {least} to {most}", name
            )

    return rule


def factor(name: str, value: Any) -> None:
    """A rule for a finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InvalidAdapter(f"{str(value)[:80]}, expected a finite number", name)
