"""Keys and values as a paged cache keeps them: in floats, or in 8 bits with scales beside them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 32  # numbers of one scale
_SCALE_BYTES = 4  # float32


def stored_width(dim: int, dtype: torch.dtype) -> int:
    """Numbers, or bytes for int8, that a key or value of `dim` takes in a cache of this dtype."""
    return dim + _SCALE_BYTES * -(-dim // GROUP) if dtype is torch.int8 else dim


def stored_bytes(dim: int, dtype: torch.dtype) -> int:
    return stored_width(dim, dtype) * dtype.itemsize


def pack(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., dim] -> [..., stored_width] of the cache's dtype.

    int8: for each 32 numbers, the last of which may be fewer, round(127 x / m) with m = max |x|;
    then the scales m / 127, as the bytes of float32. The error of a number is at most m / 254. A
    group with Inf or NaN is NaN, and one of less than 1e-36 is zero.
    """
    if dtype is not torch.int8:
        return x.to(dtype)
    groups = -(-x.shape[-1] // GROUP)
    full = functional.pad(x.float(), (0, groups * GROUP - x.shape[-1]))
    full = full.view(*x.shape[:-1], groups, GROUP)
    largest = full.abs().amax(dim=-1, keepdim=True)
    finite = largest.isfinite()
    # 127 / largest would be 127 * (1 / largest), rounded twice, and decide a tie otherwise.
    factor = torch.where(largest > 1e-36, torch.full_like(largest, 127) / largest, 0)
    values = torch.where(finite, full * factor, 0).round().to(torch.int8)
    scales = torch.where(factor > 0, largest / torch.full_like(largest, 127), 0)
    scales = torch.where(finite, scales, torch.nan).squeeze(-1).contiguous()
    return torch.cat([values.flatten(-2)[..., : x.shape[-1]], scales.view(torch.int8)], dim=-1)


def unpack(rows: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `pack` kept: [..., stored_width] -> [..., dim]."""
    if rows.dtype is not torch.int8:
        return rows.to(dtype)
    scales = rows[..., dim:].contiguous().view(torch.float32)
    return (rows[..., :dim].float() * scales.repeat_interleave(GROUP, -1)[..., :dim]).to(dtype)
