"""What can be trained: one row per method."""

from __future__ import annotations

from base.load import Base
from training.config import TrainConfig
from training.methods.bottleneck import BOTTLENECK
from training.methods.full import FULL
from training.methods.low_rank import LOW_RANK
from training.methods.method import Attached, Method


def _peft(base: Base, config: TrainConfig) -> Attached:
    from training.methods import peft_methods  # PEFT takes seconds to import

    return peft_methods.attach(base, config)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *LOW_RANK,
        Method("adalora", _peft),
        Method("bitfit", _peft),
        Method("ia3", _peft),
        Method("ln_tuning", _peft),
        Method("oft", _peft),
        Method("p_tuning", _peft),
        Method("prefix_tuning", _peft, through_cache=True),
        Method("prompt_tuning", _peft),
        Method("vblora", _peft),
        Method("vera", _peft),
        Method("waveft", _peft),
        BOTTLENECK,
        FULL,
    )
}

__all__ = ["METHODS", "Attached", "Method", "attach"]


def attach(base: Base, config: TrainConfig) -> Attached:
    """A fresh adapter of `config.method` on the base, which is frozen as it was loaded.

    Raises MethodError when the base has no place for it.
    """
    return METHODS[config.method.kind].attach(base, config)
