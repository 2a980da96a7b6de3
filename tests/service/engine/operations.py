"""A recorder of steps that needs no GPU, and does what a CUDA graph does.

It keeps each operation of a function with the very tensors that it read and wrote, and a replay
runs these again: no line of Python that chose them, and whatever now stands in the tensors. What
would make a device wait is refused, as a graph refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import base.dense
import base.nf4
import service.engine.attention
from base import kernels

Made = TypeVar("Made")
Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]

# What a GPU has one launch for, by where its callers find it.
LAUNCHES = (
    (base.nf4, "nf4_linear"),
    (base.dense, "dense_linear"),
    (kernels, "dense_linear"),
    (kernels, "lowrank_add"),
    (service.engine.attention, "cache_write"),
    (service.engine.attention, "paged_attention"),
)
WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


class Operations:
    """A Recorder. `patch` puts it around LAUNCHES."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._log: list[Operation] | None = None
        self.counts: list[int] = []  # operations of each record
        for place, name in LAUNCHES:
            patch.setattr(place, name, self._launch(getattr(place, name)))

    def record(self, run: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        log: list[Operation] = []
        with _Logging(log), _refusing_to_wait():
            self._log = log
            try:
                made = run()
            finally:
                self._log = None
        self.counts.append(len(log))
        return made, lambda: _replay(log)

    def _launch(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*operands: Any, **named: Any) -> Any:
            if self._log is None:
                return kernel(*operands, **named)
            with _disable_current_modes(), _waiting():
                made = kernel(*operands, **named)
            self._log.append((kernel, operands, named, made))
            return made

        return launch


class _Logging(TorchDispatchMode):
    def __init__(self, log: list[Operation]) -> None:
        super().__init__()
        self._log = log

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        chosen = [t for t in tree_leaves(args[1:2]) if isinstance(t, torch.Tensor)]
        by_mask = name.startswith("aten::index") and any(t.dtype is torch.bool for t in chosen)
        if name in WAITING or by_mask:
            raise AssertionError(f"{name} waits for the device")
        made = func(*args, **(kwargs or {}))
        self._log.append((func, args, kwargs or {}, made))
        return made


def _replay(log: list[Operation]) -> None:
    for run, args, kwargs, made in log:
        again = run(*args, **kwargs)
        for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)


_real = {name: torch.Tensor.__dict__.get(name) for name in WAITS}  # None: it is inherited


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    def refuse(*operands: Any) -> Any:
        raise AssertionError("this waits for the device")

    for name in WAITS:
        setattr(torch.Tensor, name, refuse)
    try:
        yield
    finally:
        _restore()


@contextmanager
def _waiting() -> Iterator[None]:
    """Within it, tensors may be read again: a kernel of the CPU does."""
    refusals = {name: getattr(torch.Tensor, name) for name in WAITS}
    _restore()
    try:
        yield
    finally:
        for name, refusal in refusals.items():
            setattr(torch.Tensor, name, refusal)


def _restore() -> None:
    for name, method in _real.items():
        if method is None:
            delattr(torch.Tensor, name)
        else:
            setattr(torch.Tensor, name, method)
