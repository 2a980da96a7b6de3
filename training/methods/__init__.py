"""What can be trained: one row per method."""

from __future__ import annotations

from training.methods.dora import DORA
from training.methods.lora import LORA, RSLORA
from training.methods.method import Method

METHODS: dict[str, Method] = {method.name: method for method in (LORA, RSLORA, DORA)}

__all__ = ["METHODS", "Method"]
