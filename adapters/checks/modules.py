"""Which modules a method adapts and which it replaces whole, once its own bounds are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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


def norms_of(fields: Targeting, spec: BaseSpec, method: str) -> tuple[list[str], list[str]]:
    """`linears_of` for a method that adapts norms."""
    targets, saved = modules_of(fields, spec)
    wrong = next((path for path in targets if path not in spec.norms), None)
    if wrong:
        raise InvalidAdapter(
            f"{wrong} is no norm, which {method} wants: use modules_to_save to replace it",
            "target_modules",
        )
    return sorted(targets), sorted(saved)


def whole_modules(spec: BaseSpec, saved: Iterable[str]) -> dict[str, Expected]:
    """The tensors that PEFT saves for modules_to_save, by name."""
    return {name: expected for path in saved for name, expected in whole_module(spec, path)}


def private(paths: Iterable[str], spec: BaseSpec) -> int:
    """Numbers of a matrix and a bias of one's own at each of these linears."""
    shapes = [spec.linears[path] for path in paths]
    return sum(s.out_features * (s.in_features + int(s.bias)) for s in shapes)


def shared_sizes(paths: Iterable[str], spec: BaseSpec) -> int:
    """Columns of A and rows of B in all, where layers of one size share one matrix."""
    shapes = [spec.linears[path] for path in paths]
    return sum({s.in_features for s in shapes}) + sum({s.out_features for s in shapes})


def older_pattern(
    patterns: Mapping[str, int], default: int, paths: Iterable[str]
) -> dict[str, int]:
    """The value of each path by PEFT's older rule, where a dot must stand before what matches."""

    def value(path: str) -> int:
        found = (own for key, own in patterns.items() if re.match(rf".*\.{key}$", path))
        return next(found, patterns.get(path, default))

    return {path: value(path) for path in paths}


def touched(targets: Iterable[str], saved: Iterable[str]) -> tuple[str, ...]:
    """Every module path that the adapter touches, sorted."""
    return tuple(sorted({*targets, *saved}))
