"""Floats to NF4 on the CPU, to bitsandbytes' bytes: codes, scales, and the scales' own codes.

Computed here because importing bitsandbytes takes seconds of every start, because on some
processors it tries to fetch kernels from a hub, and because it holds a weight several times in
float32 while it works.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

# The 16 levels of NF4: quantiles of a standard normal, scaled to [-1, 1]
# (Dettmers et al. 2023, "QLoRA", appendix E), as bitsandbytes rounds them.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCKSIZE = 64  # weights of one scale
NESTED_BLOCKSIZE = 256  # scales of one nested scale: bitsandbytes knows no other

_AT_ONCE = 1 << 22  # weights; a multiple of the block, and a bound on temporary memory
_STEPS = 1 << 16  # of [-1, 1] in the table by which bitsandbytes finds a scale's code on a CPU


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W -> codes, two in a byte, and absmax [blocks]: each weight to the nearest level."""
    levels = torch.tensor(NF4_LEVELS)
    bounds = (levels[:-1] + levels[1:]) / 2
    flat = weight.contiguous().reshape(-1)
    packed, absmax = [], []
    for piece in torch.split(flat, _AT_ONCE):
        scale, scaled = _scaled(piece.float(), BLOCKSIZE)
        codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8).view(-1)
        absmax.append(scale)
        packed.append(((codes[::2] << 4) | codes[1::2])[: (len(piece) + 1) // 2])
    return torch.cat(packed), torch.cat(absmax)


class NestedScales(NamedTuple):
    """Scales in 8 bits: scale[i] = code[absmax[i]] * nested_absmax[i // 256] + offset."""

    absmax: Tensor  # uint8 [blocks]
    nested_absmax: Tensor  # float32 [ceil(blocks / 256)]
    code: Tensor  # float32 [256]
    offset: Tensor  # float32 []


def quantize_scales(absmax: Tensor) -> NestedScales:
    """Double quantisation, bitsandbytes' `compress_statistics`: absmax [blocks], less its mean, in
    blocks of 256 and 8 bits ("QLoRA", section 3)."""
    offset = _mean(absmax)
    nested_absmax, scaled = _scaled(absmax - offset, NESTED_BLOCKSIZE)
    steps = ((scaled + 1) * 0.5 * (_STEPS - 1) + 0.5).int().clamp(0, _STEPS - 1)
    # bitsandbytes gives the first code to a block of zeros; any would do, times a scale of nothing.
    codes = torch.where(nested_absmax[:, None] == 0, 0, _code_of_step()[steps])
    codes = codes.view(-1)[: len(absmax)].contiguous()
    return NestedScales(codes, nested_absmax, dynamic_code(), offset)


def _scaled(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """max |v| of each block, and the blocks [blocks, blocksize] over it; the last filled up."""
    blocks = nn.functional.pad(values, (0, -len(values) % blocksize)).view(-1, blocksize)
    scale = blocks.abs().amax(-1)
    return scale, (blocks * (1.0 / scale.clamp(min=1e-38))[:, None]).clamp(-1, 1)


def _mean(values: Tensor) -> Tensor:
    """In one thread: torch's sum of many values has other bits for each number of threads, and a
    base must not depend on how many its process was given."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return values.mean()
    finally:
        torch.set_num_threads(threads)


def dynamic_code() -> Tensor:
    """float32 [256], ascending: a sign, an exponent of ten that takes as many bits as it needs,
    and a fraction in what it leaves (Dettmers 2015, "8-bit approximations for parallelism in deep
    learning"), as bitsandbytes' `create_dynamic_map` makes it. Each weight has a tensor of its own,
    which it may move and save."""
    return torch.tensor(_dynamic_code(), dtype=torch.float32)


@cache
def _dynamic_code() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        ends = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10 ** (exponent - 6) * ((ends[:-1] + ends[1:]) / 2.0)
        values += [*middles.tolist(), *(-middles).tolist()]
    return tuple(sorted(values))


@cache
def _code_of_step() -> Tensor:
    """uint8 [65536]: the code nearest to each of so many steps from -1 to 1. Not quite the nearest
    code of every scale: bitsandbytes rounds to a step first, and its bytes are what is wanted."""
    code = dynamic_code()
    steps = -1.0 + (2.0 * torch.arange(_STEPS, dtype=torch.float32)) / (_STEPS - 1)
    return torch.bucketize(steps, 0.5 * (code[:-1] + code[1:])).to(torch.uint8)
