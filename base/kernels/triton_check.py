"""Do Triton's kernels compute what the oracle does on this device? Asked once, before they serve.

These kernels have run in the interpreter only: where one does not compile or differs on a GPU,
plain torch serves, and a warning in the log says which.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import reference
from .lowrank import LowRank, LowRankPlan, Segment

_BOUND = 2e-2  # of bfloat16, in the norm; a wrong index is far above it


@lru_cache
def serve_on(device: torch.device) -> bool:
    """Are the kernels there, and right on this device? Compiles them the first time."""
    if find_spec("triton") is None:
        return False
    with torch.cuda.device(device):  # Triton launches on the current one
        fault = find_fault(device)
    if fault:
        logging.getLogger(__name__).warning("plain torch serves on %s: %s", device, fault)
    return not fault


def find_fault(device: torch.device) -> str:
    """Why the kernels cannot serve on a device, or nothing."""
    try:
        errors = {"lowrank_add": _lowrank_error(device), "attention": _attention_error(device)}
    except Exception as error:  # of a compiler or driver: any type, and none may stop a server
        return f"Triton's kernels do not run ({type(error).__name__}: {error})"
    wrong = {name: error for name, error in errors.items() if not error < _BOUND}
    return ", ".join(f"{name} is off by {error:.2g}" for name, error in wrong.items())


def _lowrank_error(device: torch.device) -> float:
    from . import triton_lowrank

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    term = LowRank(draw(5, 40), draw(24, 5).bfloat16(), draw(5), draw(24), draw(24))
    plan = LowRankPlan([Segment(1, 4, term)])
    x, y = draw(4, 40), draw(4, 24)
    half = triton_lowrank.lowrank_add(y.bfloat16(), x.bfloat16(), plan).float()
    return _difference(half, reference.lowrank_add(y.double(), x.double(), plan))


def _attention_error(device: torch.device) -> float:
    from . import triton_attention

    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((3, 4, 16), (3, 16, 2, 16), (3, 16, 2, 16))
    )
    tables, starts, contexts = (
        torch.tensor(numbers, dtype=torch.int32, device=device)
        for numbers in ([[2, 0], [1, 0]], [0, 2, 3], [20, 7])
    )
    index = (tables, starts, contexts, 0.25)
    y = triton_attention.paged_attention(q, k, v, *index)
    wanted = reference.paged_attention(q.double(), k.double(), v.double(), *index)
    return _difference(y, wanted)


def _difference(y: Tensor, wanted: Tensor) -> float:
    return float((y.double() - wanted).norm() / wanted.norm())
