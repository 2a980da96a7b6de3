"""The places of a base where a method puts its layers."""

from __future__ import annotations

from torch import nn

from base.load import Base
from base.nf4 import NF4Linear
from training.config import ALL_LINEAR
from training.errors import MethodError


def targets(base: Base, names: tuple[str, ...]) -> dict[str, NF4Linear]:
    """The quantised linear layers whose paths end in one of `names`, in the model's order.

    Raises MethodError when a name fits none.
    """
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


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set `module` at `path` of the model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
