"""GLoRA: W' = W + W ⊙ A + B as a private matrix, and b' = b + b ⊙ D + E + W C."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.checks.glora import Shape, leaves_of, parts_of
from adapters.delta import Delta, LinearDelta
from adapters.errors import InvalidAdapter
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .dense import Change, Dense, dense
from .target import Target, targets
from .whole import lower_saved


def lower_glora(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta | Dense]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta | Dense] = {**lower_saved(config, checkpoint, base)}
    for target in targets(config, checkpoint, base):
        shape = base.spec.linears[target.path]
        parts = {
            part: _part(target, part, form, leaves_of(form, size, config["r"]), size)
            for part, (form, size) in parts_of(config, shape).items()
        }
        bias = _bias(target, parts)
        if config["config_A_B"] == "none":
            deltas[target.path] = LinearDelta(bias=bias)
            continue
        change = partial(_changed, parts["glora_A"], parts["glora_B"])
        deltas[target.path] = dense(target.path, base, change, bias)
    return deltas


def _part(
    target: Target, part: str, form: str, leaves: Mapping[str, Shape], size: Shape
) -> tuple[Tensor, ...]:
    """The tensors of one of A to E: a pair of factors, or one that stretches to its shape."""
    name = f"{target.path}.{part}.zeros"
    empty = form == "none" and target.checkpoint.has(name)
    if empty and bool(target.take(f"{part}.zeros", *size).any()):
        raise InvalidAdapter("holds other numbers than zeros", name)
    return tuple(target.take(f"{part}.{leaf}", *shape) for leaf, shape in leaves.items())


def _rows(part: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
    """Rows of a part, [stop - start, width or 1]."""
    if len(part) == 2:
        return part[0][start:stop] @ part[1]
    return part[0][start:stop] if part[0].dim() == 2 else part[0]


def _changed(A: tuple[Tensor, ...], B: tuple[Tensor, ...]) -> Change:
    return lambda tile, start, stop: tile + tile * _rows(A, start, stop) + _rows(B, start, stop)


def _bias(target: Target, parts: Mapping[str, tuple[Tensor, ...]]) -> Tensor | None:
    if target.linear.bias is None:
        return None
    own = target.linear.bias.detach().float()
    bias = own.clone()
    if parts["glora_D"]:
        bias += own * parts["glora_D"][0] + parts["glora_E"][0]
    if parts["glora_C"]:
        bias += target.times(_rows(parts["glora_C"], 0, target.n)).flatten()
    return bias
