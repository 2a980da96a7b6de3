"""Which modules a method adapts and which it replaces whole, once its own bounds are kept."""

from __future__ import annotations

from collections.abc import Iterable

from adapters.errors import InvalidAdapter
from adapters.promises import Expected, whole_module
from adapters.targets import Targeting, modules_of
from base.spec import BaseSpec


def linears_of(fields: Targeting, spec: BaseSpec, method: str) -> tuple[list[str], list[str]]:
    """Targets, which must be linears, and modules_to_save; both sorted. Raises InvalidAdapter."""
    targets, saved = modules_of(fields, spec)
    wrong = next((path for path in targets if path not in spec.linears), None)
    if wrong:
        raise InvalidAdapter(f"{wrong} is no linear: {method} wants linears", "target_modules")
    return sorted(targets), sorted(saved)


def whole_modules(spec: BaseSpec, saved: Iterable[str]) -> dict[str, Expected]:
    """The tensors that PEFT saves for modules_to_save, by name."""
    return {name: expected for path in saved for name, expected in whole_module(spec, path)}


def touched(targets: Iterable[str], saved: Iterable[str]) -> tuple[str, ...]:
    """Every module path that the adapter touches, sorted."""
    return tuple(sorted({*targets, *saved}))
