"""CUDA graphs: a function over tensors at fixed addresses, launched again as one.

A graph repeats the launches of its capture with the arguments that they had. So the function may
read nothing that changes but tensors, and it may not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from . import triton_check

Made = TypeVar("Made")

_WARM_UPS = 2  # kernels are compiled and loaded, libraries take their workspaces


class Recorder(Protocol):
    """Records functions: what one made is made again, in the same tensors, by each replay."""

    def record(self, run: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        """(what `run` made, replay). `run` is called more than once."""


class CudaRecorder:
    """torch's graphs, all in one pool of memory: what a graph made is there until another runs.

    Other threads may go on using the device meanwhile, but not the streams of this one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph: Any = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                made = run()
        return made, graph.replay


def recorder_for(device: torch.device) -> Recorder | None:
    """None where steps cannot be captured: no CUDA, or plain torch, which waits, serves there."""
    if device.type != "cuda" or not triton_check.serve_on(device):
        return None
    return CudaRecorder(device)


class Staged:
    """Numbers that the host writes and a graph reads: `host` here, `there` at a fixed address."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.there = torch.zeros(count, dtype=dtype, device=device)
        self.host = torch.zeros(count, dtype=dtype, pin_memory=device.type == "cuda")
        self._sent: Any = None  # when the last copy was on its way
        if device.type == "cuda":
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def writable(self) -> Tensor:
        """`host`, once the last copy of it has arrived."""
        if self._sent is not None:
            self._sent.synchronize()
        return self.host

    def send(self, count: int | None = None) -> None:
        """Copy the first `count` numbers, or all; what runs on this stream after it sees them."""
        self.there[:count].copy_(self.host[:count], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
