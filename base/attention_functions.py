"""The attention functions that layers call by name: one registry before transformers' own.

A model of transformers looks its function up there, so `choose` puts it there, too; our layers look
here first. A process whose model needs nothing of transformers therefore never imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from base.lean.model import LeanModel

Attend = Callable[..., tuple[Any, Any]]

_registered: dict[str, Attend] = {}


def register(name: str, attend: Attend) -> None:
    """Let layers find `attend`, of transformers' signature, under `name`."""
    _registered[name] = attend


def find(name: str) -> Attend:
    """The function of a name, ours or transformers'. Raises KeyError where nobody has it."""
    found = _registered.get(name)
    if found is None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        found = ALL_ATTENTION_FUNCTIONS[name]
    return found


def choose(model: Any, name: str) -> None:
    """Let the layers of a model call the function that was registered under `name`."""
    if not isinstance(model, LeanModel):
        from transformers import AttentionInterface

        # No mask function goes with it: transformers then builds no mask.
        AttentionInterface.register(name, _registered[name])
    model.set_attn_implementation(name)
