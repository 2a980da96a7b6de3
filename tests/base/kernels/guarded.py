"""Tensors in hostile places, and a quiet place for oracles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GUARD = 64


def unaligned(values: Tensor) -> Tensor:
    """The same values, contiguous, four bytes off any alignment, NaN before and after."""
    room = torch.full((values.numel() + 2 * GUARD + 1,), float("nan"))
    view = room[GUARD + 1 :][: values.numel()].view(values.shape)
    assert view.numel() == 0 or view.data_ptr() % 8 == 4
    return view.copy_(values)


class Guarded:
    """A float32 tensor for results: NaN inside, marked floats around."""

    def __init__(self, *shape: int) -> None:
        size = 1
        for length in shape:
            size *= length
        self._room = torch.full((size + 2 * GUARD + 1,), -12345.0)
        self.inside = self._room[GUARD + 1 :][:size].view(shape).fill_(float("nan"))

    def check(self) -> None:
        """Nothing was left out, nothing was written outside."""
        assert not self.inside.isnan().any()
        size = self.inside.numel()
        assert (self._room[: GUARD + 1] == -12345.0).all()
        assert (self._room[GUARD + 1 + size :] == -12345.0).all()


@contextmanager
def one_thread() -> Iterator[None]:
    """For torch's part of a comparison: on a busy machine its threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
