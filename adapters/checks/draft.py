"""The steps that the checks of most methods have in common: open, promise tensors, close."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adapters.checked import Checked, Validated, numbers
from adapters.checks.modules import linears_of, touched, whole_modules
from adapters.config_rules import Rule, apply_rules, target_fields
from adapters.promises import PREFIX, SHARED, Expected, consume
from adapters.safetensors_header import Header
from adapters.targets import Targeting
from base.spec import BaseSpec

Chooser = Callable[[Targeting, BaseSpec, str], tuple[list[str], list[str]]]


class Draft:
    """One config, as far as it has been checked, and the tensors that it promises.

    paths  the modules that the method adapts, sorted
    saved  those that it replaces whole (modules_to_save), sorted

    Opening raises InvalidAdapter where a field breaks its rule, or a module is not one that the
    method adapts; `close` where the file holds other tensors than the promised ones.
    """

    def __init__(
        self,
        method: str,
        config: Mapping[str, Any],
        rules: Mapping[str, Rule],
        header: Header,
        spec: BaseSpec,
        choose: Chooser = linears_of,
    ) -> None:
        apply_rules(config, rules)
        self.header, self.spec = header, spec
        self.paths, self.saved = choose(target_fields(config), spec, method)
        self.promised = whole_modules(spec, self.saved)
        self.optional: dict[str, Expected] = {}

    def promise(
        self, path: str, leaf: str, *shape: int, role: str = "factor", why: str = ""
    ) -> None:
        """A tensor of one module."""
        self.promised[f"{PREFIX}{path}.{leaf}"] = Expected(path, shape, role, why)

    def promise_shared(self, name: str, *shape: int, why: str = "") -> None:
        """A tensor that belongs to no module: a bank or projection of all layers."""
        self.promised[f"{SHARED}{name}"] = Expected("", shape, "shared", why)

    def allow(self, path: str, leaf: str, *shape: int) -> None:
        """A tensor of one module that says nothing new, so it may be missing."""
        self.optional[f"{PREFIX}{path}.{leaf}"] = Expected(path, shape, "copy")

    def close(self, kind: str, rank: int, memory: int | None = None, **fields: Any) -> Checked:
        """What the checks found out.

        rank    the largest of any target, as it is served
        memory  numbers that the lowered adapter holds beside `saved`; None: those of the file
        fields  the canonical config beside targets and saved modules
        """
        found = consume(self.header.tensors, self.promised, self.spec, self.paths, self.optional)
        held = numbers(found) if memory is None else memory + numbers(found, "saved")
        return Checked(
            Validated(
                kind=kind,
                rank=rank,
                targets=touched(self.paths, self.saved),
                config={
                    "peft_type": kind.upper(),
                    **fields,
                    "target_modules": self.paths,
                    "modules_to_save": self.saved or None,
                },
                parameters=numbers(found),
                memory_bytes=4 * held,
            )
        )
