"""Tensors that several layers and several adapters hold in common: in memory once."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from weakref import WeakValueDictionary

from torch import Tensor

Key = tuple[object, ...]

_held: WeakValueDictionary[Key, Tensor] = WeakValueDictionary()
_lock = Lock()  # several threads lower at a time


def shared(key: Key, make: Callable[[], Tensor]) -> Tensor:
    """The tensor of this key, made where nobody holds it. It goes with the last who holds it.

    The key must say all that the tensor depends on, its dtype and device among it. Nobody may
    write to the tensor.
    """
    with _lock:
        tensor = _held.get(key)
        if tensor is None:
            tensor = _held[key] = make()
        return tensor
