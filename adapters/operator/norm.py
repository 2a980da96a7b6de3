"""The operator at a norm: an adapter's own scale for its own rows."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from adapters.delta import Delta, PrivateNorm
from base.kernels import AdapterTable

from .layer import AdaptedLayer, OperatorContext, kept_input


class AdaptedNorm(AdaptedLayer):
    """A norm of the base, and the adapters' own scales: [1, T, ..., width] to the same shape."""

    def __init__(self, path: str, inner: nn.Module, context: OperatorContext) -> None:
        super().__init__(path, inner, context)
        # The own scale is the spare's `weight` while it runs: another thread may be running
        # `inner`. In a tuple, so that it is no module of the model.
        weight = inner.get_parameter("weight")
        spare = copy.deepcopy(inner, {id(weight): weight})
        del spare._parameters["weight"]
        self._spare = (spare,)

    def forward(self, x: Tensor) -> Tensor:
        plan = self.context.plans.get(self.path)
        if kept_input(self.path) in self.context.plans:
            self.context.inputs[self.path] = x
        y: Tensor = self.inner(x)
        if plan is None:
            return y
        y = y.clone()
        (spare,) = self._spare
        for start, stop, weight in plan:
            spare.weight = weight
            y[:, start:stop] = spare(x[:, start:stop])
        del spare.weight  # an adapter that goes takes it along
        return y

    def put(self, part: Any, table: AdapterTable, place: int) -> bool:
        if part.shape != self.weight.shape:
            return False
        table.put_norm(place, part)
        return True

    def reads_of(self, part: Any) -> Iterable[str]:
        del part
        return ()

    def prepare(self, delta: Delta) -> Tensor:
        if not isinstance(delta, PrivateNorm):
            raise self.wrong(delta)
        return delta.weight
