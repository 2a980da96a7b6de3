"""Method: how one kind of adapter is trained and how PEFT calls what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from training.config import MethodConfig
from training.layers import LoraLinear


@dataclass(frozen=True, slots=True)
class Method:
    """`layer` is the class that stands in a target's place; `scale` is s of its equation.

    `tensors` maps the end of each tensor's name in PEFT's checkpoint to the layer's parameter.
    """

    name: str
    layer: type[LoraLinear]
    scale: Callable[[MethodConfig], float]
    tensors: Mapping[str, str]
    peft_fields: Mapping[str, Any]
