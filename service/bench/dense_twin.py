"""The same base without its 4 bits: what a server of 16 bits would multiply with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from base.dense import empty_linear
from base.load import Base
from base.nf4 import NF4Linear


def dense_twin(base: Base) -> Base:
    """Put the numbers that the NF4 weights stand for in their places, in the base's dtype; layer by
    layer, so that one at a time is there twice. For requests without adapters."""
    known: dict[str, Any] = {path: base.linear(path) for path in base.spec.linears}
    for path, linear in known.items():
        if isinstance(linear, NF4Linear):
            known[path] = _dense(linear, base)
            base.model.set_submodule(path, known[path])
    return replace(base, _linears=known)


def _dense(linear: NF4Linear, base: Base) -> nn.Linear:
    out, width = linear.weight.shape
    made = empty_linear(nn.Linear, out, width, bias=False)
    made.weight = nn.Parameter(linear.weight.dequantize(base.dtype), requires_grad=False)
    made.register_parameter("bias", linear.bias)
    return made.train(linear.training)
