"""Tensors that several layers and several adapters hold in common: in memory once.

Those that a method draws from a seed are `shared` by name, before they are made a second time; any
others that are the same byte for byte, such as a frozen A or a saved table, are found by digest.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from adapters.delta import LoweredAdapter

Key = tuple[object, ...]
SMALLEST = 4096  # bytes: below, a tensor costs less than looking it up

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


def interned(adapter: LoweredAdapter) -> LoweredAdapter:
    """The adapter with tensors that somebody holds already in place of its own equal ones."""
    return adapter.mapped(_interned)


def _interned(part: Any) -> Any:
    if not isinstance(part, Tensor) or part.nbytes < SMALLEST:
        return part
    if part.untyped_storage().nbytes() != part.nbytes:
        return part  # a view: to share it would keep what it is cut from
    flat = part.detach().as_strided((part.numel(),), (1,)).view(torch.uint8).cpu()
    layout = (part.dtype, tuple(part.shape), part.stride(), str(part.device))
    return shared(("bytes", sha256(flat.numpy().data).digest(), *layout), lambda: part)
