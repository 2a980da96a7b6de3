"""What serves on CUDA: bitsandbytes' fused NF4 product, and Triton's kernels for the rest.

Triton's own NF4 product (triton_nf4.py) waits here until it is measured against bitsandbytes'.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import triton_check
from .lowrank import LowRankPlan
from .slots import SlotPlan
from .weight import NF4Weight

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b: x [..., in] -> [..., out], in x's dtype.

    The operator (bitsandbytes >= 0.50.2) picks a fused kernel or dequantises, by the number of
    rows. It is called as `bitsandbytes.matmul_4bit` calls it, but builds no QuantState each time.
    """
    import bitsandbytes  # noqa: F401  (registers the operator)

    nested = weight.nested_absmax is not None
    y: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x,
        weight.packed.view(-1, 1),
        weight.shape,
        weight.nested_absmax if nested else weight.absmax,
        weight.blocksize,
        "nf4",
        bias=bias,
        absmax_8bit=weight.absmax if nested else None,
        absmax_code=weight.nested_code,
        absmax_offset=weight.nested_offset,
    )
    return y


def takes_lowrank(y: Tensor, x: Tensor, plan: LowRankPlan) -> bool:
    """Does Triton's `lowrank_add` read these, and is it right on this device?"""
    return (
        y.is_cuda
        and x.device == y.device
        and y.dtype in _FLOATS
        and x.dtype in _FLOATS
        and y.stride(1) == 1
        and all(s.term.device in (None, y.device) and not s.term.rounded for s in plan.segments)
        and triton_check.serve_on(y.device)
    )


def lowrank_add(y: Tensor, x: Tensor, plan: LowRankPlan) -> Tensor:
    """In place, for what `takes_lowrank`: y = gain * (y + B (d * (A x))) + bias by segment."""
    from . import triton_lowrank

    with _on(y.device):
        return triton_lowrank.lowrank_add(y, x, plan)


def slots_add(y: Tensor, x: Tensor, plan: SlotPlan) -> Tensor:
    """In place, for rows told by tiles: y = gain * (y + B (d * (A x))) + bias."""
    from . import triton_lowrank

    with _on(y.device):
        return triton_lowrank.slots_add(y, x, plan)


def takes_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Does Triton's `paged_attention` read these, and is it right on this device?"""
    caches = (k_cache, v_cache)
    if not (q.is_cuda and all(c.device == q.device and c.is_contiguous() for c in caches)):
        return False
    if k_cache.dtype is not v_cache.dtype or not triton_check.serve_on(q.device):
        return False
    from . import triton_attention

    return triton_attention.serves(q, k_cache)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
    sliding_window: int,
    softcap: float,
) -> Tensor:
    """For what `takes_attention`: q [T, H, D] -> [T, H, D], as the dispatch says."""
    from . import triton_attention

    with _on(q.device):
        return triton_attention.paged_attention(
            *(q, k_cache, v_cache, block_tables, query_start, context_len),
            *(scale, sliding_window, softcap),
        )


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
