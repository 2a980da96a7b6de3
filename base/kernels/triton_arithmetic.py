"""Products and roundings of Triton's kernels, on a GPU and in its interpreter.

The interpreter of version 3.7 multiplies the bits of bfloat16 as integers, and cuts where a GPU
rounds to nearest, ties to even. There both are written out in float32.
"""
# mypy: disable-error-code="no-untyped-def", allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

ON_GPU = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 to dtype, to nearest, ties to even."""
    if ON_GPU or dtype != tl.bfloat16:
        return value.to(dtype)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def add_product(total, a, b):
    """total + a b with sums in float32: on the matrix units where a and b are of one half type,
    else in float32 throughout (no TF32)."""
    if ON_GPU and a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, total)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
