"""The NF4 product on CUDA for few rows, over bitsandbytes' packed layout: y = x Wᵀ + b.

The weights of a tile are made in float32, rounded once to x's dtype as `NF4Weight.dequantize`
does, and multiplied with sums in float32. The columns are split by the shape of the weight alone
and the sums of the splits are added in order: a row of y depends on that row of x alone.
"""
# mypy: disable-error-code="no-untyped-def", allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantization import NESTED_BLOCKSIZE, NF4_LEVELS
from .triton_arithmetic import add_product, rounded
from .weight import NF4Weight

ROWS = 16  # of x at a time: the least that the matrix units take
OUTPUTS = 32  # rows of W of one program
COLUMNS = 64  # of W at a time; 128 would ask smaller GPUs for too much shared memory
LEAST_SPLIT = 256  # columns of one program
PROGRAMS = 512  # that a product of few rows is cut into, where its shape allows


@triton.jit
def _scale(block, mask, absmax, nested_absmax, nested_code, nested_offset, GROUP: tl.constexpr):
    """Scales of blocks: absmax, or with GROUP nested_code[absmax] * nested_absmax + offset."""
    kept = tl.load(absmax + block, mask=mask, other=0)
    if GROUP:
        level = tl.load(nested_code + kept.to(tl.int32))
        group = tl.load(nested_absmax + block // GROUP, mask=mask, other=0.0)
        return level * group + tl.load(nested_offset)
    else:
        return kept


@triton.jit
def _product(
    x,
    x_stride,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    levels,
    sums,
    rows,
    outputs,
    width,
    split_width,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(1).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(split * split_width, min(split * split_width + split_width, width), COLUMNS):
        if EVEN:  # a byte is two columns of one row of W, both in one block
            column = first + 2 * tl.arange(0, COLUMNS // 2)
            within = (out < outputs)[None, :] & (column < width)[:, None]
            number = out[None, :] * width + column[:, None]
            pair = tl.load(packed + number // 2, mask=within, other=0).to(tl.int32)
            scale = _scale(
                *(number // BLOCK, within, absmax, nested_absmax, nested_code, nested_offset),
                GROUP,
            )
            inside = (row < rows)[:, None] & (column < width)[None, :]
            place = x + row[:, None] * x_stride + column[None, :]
            high = tl.load(levels + (pair >> 4)) * scale
            part = tl.load(place, mask=inside, other=0.0)
            total = add_product(total, part, rounded(high, part.dtype))
            low = tl.load(levels + (pair & 15)) * scale
            part = tl.load(place + 1, mask=inside, other=0.0)
            total = add_product(total, part, rounded(low, part.dtype))
        else:  # a row of W may begin inside a byte
            column = first + tl.arange(0, COLUMNS)
            within = (out < outputs)[None, :] & (column < width)[:, None]
            number = out[None, :] * width + column[:, None]
            pair = tl.load(packed + number // 2, mask=within, other=0).to(tl.int32)
            scale = _scale(
                *(number // BLOCK, within, absmax, nested_absmax, nested_code, nested_offset),
                GROUP,
            )
            inside = (row < rows)[:, None] & (column < width)[None, :]
            place = x + row[:, None] * x_stride + column[None, :]
            code = tl.where(number % 2 == 0, pair >> 4, pair & 15)
            weights = tl.load(levels + code) * scale
            part = tl.load(place, mask=inside, other=0.0)
            total = add_product(total, part, rounded(weights, part.dtype))
    place = sums + (split * rows + row)[:, None] * outputs + out[None, :]
    tl.store(place, total, mask=(row < rows)[:, None] & (out < outputs)[None, :])


@triton.jit
def _fold(
    sums,
    bias,
    y,
    rows,
    outputs,
    splits,
    HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """y = Σ sums[split] + bias, in the order of the splits."""
    row = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    within = out < outputs
    total = tl.zeros((OUTPUTS,), tl.float32)
    for split in range(splits):
        total += tl.load(sums + (split * rows + row) * outputs + out, mask=within, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + out, mask=within, other=0.0).to(tl.float32)
    tl.store(y + row * outputs + out, rounded(total, y.dtype.element_ty), mask=within)


@lru_cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, device=device)


def split_columns(out: int, width: int) -> int:
    """Columns of W [out, in] of one program: a function of the weight's shape alone."""
    splits = max(1, PROGRAMS // -(-out // OUTPUTS))
    wanted = -(-width // splits)
    return max(LEAST_SPLIT, -(-wanted // COLUMNS) * COLUMNS)


@torch.no_grad()
def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b: x [..., in] in float32, bfloat16 or float16 -> [..., out] in x's dtype."""
    out, width = weight.shape
    flat = x.reshape(-1, width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, split = flat.shape[0], split_columns(out, width)
    y = torch.empty(*x.shape[:-1], out, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    splits = triton.cdiv(width, split)
    sums = torch.empty(splits, rows, out, dtype=torch.float32, device=x.device)
    nested = weight.is_nested
    _product[(triton.cdiv(rows, ROWS), triton.cdiv(out, OUTPUTS), splits)](
        *(flat, flat.stride(0), weight.packed, weight.absmax),
        *(weight.nested_absmax if nested else weight.absmax,),
        *(weight.nested_code if nested else weight.absmax,),
        *(weight.nested_offset if nested else weight.absmax,),
        *(_levels(x.device), sums, rows, out, width, split),
        BLOCK=weight.blocksize,
        GROUP=NESTED_BLOCKSIZE if nested else 0,
        EVEN=width % 2 == 0 and weight.blocksize % 2 == 0,
        ROWS=ROWS,
        OUTPUTS=OUTPUTS,
        COLUMNS=COLUMNS,
    )
    _fold[(rows, triton.cdiv(out, 128))](
        *(sums, sums if bias is None else bias.contiguous(), y, rows, out, splits),
        HAS_BIAS=bias is not None,
        OUTPUTS=128,
    )
    return y
