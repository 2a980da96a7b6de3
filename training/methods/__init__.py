"""What can be trained: one row per method."""

from __future__ import annotations

from base.load import Base
from training.config import TrainConfig
from training.methods.bottleneck import BOTTLENECK
from training.methods.full import FULL
from training.methods.low_rank import LOW_RANK
from training.methods.method import Attached, Method
from training.methods.peft_methods import PEFT_METHODS

METHODS: dict[str, Method] = {
    method.name: method for method in (*LOW_RANK, *PEFT_METHODS, BOTTLENECK, FULL)
}

__all__ = ["METHODS", "Attached", "Method", "attach"]


def attach(base: Base, config: TrainConfig) -> Attached:
    """A fresh adapter of `config.method` on the base, which is frozen as it was loaded.

    Raises MethodError when the base has no place for it.
    """
    return METHODS[config.method.kind].attach(base, config)
