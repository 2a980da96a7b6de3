"""The NF4 product on CUDA: bitsandbytes' fused operator on our fields."""

from __future__ import annotations

import torch
from torch import Tensor

from .weight import NF4Weight


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
