"""Putting trainable layers in the place of a base's linear layers, and taking them out again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from base.load import Base
from base.nf4 import NF4Linear
from training.config import ALL_LINEAR, MethodConfig
from training.errors import MethodError
from training.layers import LoraLinear
from training.methods import METHODS

Layers = Mapping[str, LoraLinear]  # module path -> the layer that stands there


def attach(base: Base, config: MethodConfig) -> Layers:
    """Set a fresh trainable layer at each target; the base itself is frozen as it was loaded.

    Raises MethodError when a name in `config.targets` fits no quantised linear layer.
    """
    method = METHODS[config.kind]
    layers: dict[str, LoraLinear] = {}
    for path, linear in targets(base, config.targets).items():
        layer = method.layer(linear, config.rank, method.scale(config), config.dropout)
        _replace(base.model, path, layer)
        layers[path] = layer
    return layers


def detach(base: Base, layers: Layers) -> None:
    """Set the base's own layers back."""
    for path, layer in layers.items():
        _replace(base.model, path, layer.base)


def targets(base: Base, names: tuple[str, ...]) -> dict[str, NF4Linear]:
    """The quantised linear layers whose paths end in one of `names`, in the model's order."""
    linears = {
        path: module for path, module in base.model.named_modules() if isinstance(module, NF4Linear)
    }
    known = {last_part(path) for path in linears}
    unknown = set(names) - known - {ALL_LINEAR}
    if unknown or not linears:
        raise MethodError(
            f"method.targets {sorted(unknown)} fit no quantised linear layer of {base.spec.id}; "
            f"there are {sorted(known)}"
        )
    if ALL_LINEAR in names:
        return linears
    return {path: linear for path, linear in linears.items() if last_part(path) in names}


def last_part(path: str) -> str:
    return path.rpartition(".")[2]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
