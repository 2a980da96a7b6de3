"""Which modules of a base a PEFT config touches: PEFT's own rules, over this base's module paths.

A string `target_modules` and the keys of patterns are regular expressions of the user: call these
only where time is bounded (`validate_in_child`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from adapters.errors import InvalidAdapter
from base.spec import BaseSpec

ALL_LINEAR = "all-linear"


class Targeting(Protocol):
    """The fields of any method's config that choose modules."""

    @property
    def target_modules(self) -> str | tuple[str, ...]: ...
    @property
    def exclude_modules(self) -> str | tuple[str, ...]: ...
    @property
    def modules_to_save(self) -> tuple[str, ...]: ...
    @property
    def layers_to_transform(self) -> tuple[int, ...] | None: ...
    @property
    def layers_pattern(self) -> tuple[str, ...]: ...
    @property
    def ensure_weight_tying(self) -> bool: ...


def modules_of(fields: Targeting, spec: BaseSpec) -> tuple[list[str], set[str]]:
    """Paths that the method adapts, and paths that the adapter replaces whole.

    Raises InvalidAdapter where nothing is targeted, or something twice.
    """
    saved = saved_modules(fields, spec)
    targets = _target_modules(fields, spec)
    if not targets:
        raise InvalidAdapter("no module of this base is targeted", "target_modules")
    both = sorted(saved.intersection(targets))
    if both:
        raise InvalidAdapter(f"{both[0]} is a target too", "modules_to_save")
    return targets, saved


def matching(patterns: Mapping[str, Any], path: str) -> list[Any]:
    """PEFT's `get_pattern_key`: values whose key matches the path or the end of it, in order."""
    return [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)]


def module_paths(spec: BaseSpec) -> tuple[str, ...]:
    """Every module of a base that an adapter can touch."""
    return (*spec.linears, *spec.embeddings, *spec.norms)


def with_ancestors(path: str) -> Iterator[str]:
    """The path, and every module that holds it, innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _target_modules(fields: Targeting, spec: BaseSpec) -> list[str]:
    """PEFT's rule (`check_target_module_exists`) over this base's module paths."""
    targets = [path for path in module_paths(spec) if _is_target(fields, spec, path)]
    if fields.ensure_weight_tying and spec.tied_embeddings:
        targets += [path for path in tied_with(spec, targets) if path not in targets]
    return targets


def _is_target(fields: Targeting, spec: BaseSpec, path: str) -> bool:
    if _listed(fields.exclude_modules, path) or _inside(fields.modules_to_save, path):
        return False
    targets = fields.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return path in spec.linears and not is_output(spec, path)
    if isinstance(targets, str) or path in targets:
        return _listed(targets, path)
    return _listed(targets, path) and _in_layers(fields, path)


def _listed(names: str | tuple[str, ...], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def _inside(names: tuple[str, ...], path: str) -> bool:
    return any(f".{name}." in f".{path}." for name in names)


def is_output(spec: BaseSpec, path: str) -> bool:
    """The output layer, which `all-linear` leaves out: the one whose rows are the vocabulary."""
    shape = spec.linears[path]
    return not shape.quantized and "." not in path and shape.in_features == spec.hidden_size


def _in_layers(fields: Targeting, path: str) -> bool:
    if fields.layers_to_transform is None:
        return True
    if not fields.layers_pattern:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    else:
        found = (
            re.match(rf"(?:^|.*?\.){re.escape(p)}\.(\d+)\.", path) for p in fields.layers_pattern
        )
        match = next((m for m in found if m), None)
    return match is not None and int(match[1]) in fields.layers_to_transform


def saved_modules(fields: Targeting, spec: BaseSpec) -> set[str]:
    """PEFT's rule (`_set_trainable`): a name is a bare suffix, no dot needed before it."""
    saved: set[str] = set()
    for name in fields.modules_to_save:
        matched = {
            path
            for path in module_paths(spec)
            if any(p.endswith(name) for p in with_ancestors(path))
        }
        if not matched:
            raise InvalidAdapter(f"this base has no module {name!r}", "modules_to_save")
        saved |= matched
    if fields.ensure_weight_tying and spec.tied_embeddings:
        saved |= set(tied_with(spec, saved))
    return saved


def tied_with(spec: BaseSpec, paths: Iterable[str]) -> list[str]:
    """The table and the head, where one of them is in `paths` and they are one matrix."""
    tied = [
        p for p in (*spec.embeddings, *spec.linears) if p in spec.embeddings or is_output(spec, p)
    ]
    return [path for path in tied if set(tied) & set(paths)]
