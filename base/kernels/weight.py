"""A linear layer's weight in NF4, in the layout bitsandbytes writes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .quantization import NESTED_BLOCKSIZE, NF4_LEVELS, quantize, quantize_scales

_RECORD = struct.Struct("=QQQQQQqqq")  # `nf4_weight` of csrc/kernels.h


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """W [out, in]: 4-bit codes and one scale for each `blocksize` consecutive weights.

    Weight number n (row-major, n = row * in + column) is level[code n] * scale[n // blocksize].
    `packed` keeps two codes in each byte, the even n in the high four bits. Blocks ignore row
    ends: a row starts inside a block when `in` is no multiple of `blocksize`.

    Plain: `absmax` is the scales, float32 [blocks], and the nested fields are None.
    Double-quantised: `absmax` is uint8 [blocks] and
    scale[i] = nested_code[absmax[i]] * nested_absmax[i // 256] + nested_offset.
    Kernels decode that as they go, so it stays as small in memory as it is on disk.
    """

    packed: Tensor  # uint8 [ceil(out * in / 2)]
    absmax: Tensor  # float32 [blocks], or uint8 [blocks] when double-quantised
    shape: tuple[int, int]  # (out, in)
    blocksize: int = 64
    nested_absmax: Tensor | None = None  # float32 [ceil(blocks / 256)]
    nested_code: Tensor | None = None  # float32 [256]
    nested_offset: Tensor | None = None  # float32 []

    def __post_init__(self) -> None:
        out, width = self.shape
        blocks = -(-out * width // self.blocksize)
        if self.packed.dtype != torch.uint8 or self.packed.numel() != (out * width + 1) // 2:
            raise ValueError(
                f"packed codes of an NF4 weight {out}x{width} must be uint8 with "
                f"{(out * width + 1) // 2} bytes, got {self.packed.dtype} with "
                f"{self.packed.numel()}"
            )
        if not all(tensor.is_contiguous() for tensor in self.tensors().values()):
            raise ValueError("the tensors of an NF4 weight must be contiguous")
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        if any(part is None for part in nested) != all(part is None for part in nested):
            raise ValueError(
                "a double-quantised NF4 weight needs nested_absmax, nested_code and "
                "nested_offset together; got only some of them"
            )
        wanted = torch.uint8 if self.is_nested else torch.float32
        if self.absmax.dtype != wanted or self.absmax.numel() != blocks:
            raise ValueError(
                f"absmax of an NF4 weight {out}x{width} with blocks of {self.blocksize} must be "
                f"{wanted} with {blocks} values, got {self.absmax.dtype} with "
                f"{self.absmax.numel()}"
            )
        if self.nested_absmax is not None and self.nested_code is not None:
            groups = -(-blocks // NESTED_BLOCKSIZE)
            if self.nested_absmax.numel() != groups or self.nested_code.numel() != 256:
                raise ValueError(
                    f"nested_absmax must have {groups} values and nested_code 256, got "
                    f"{self.nested_absmax.numel()} and {self.nested_code.numel()}"
                )

    @property
    def is_nested(self) -> bool:
        """Are the scales themselves quantised (bitsandbytes' `compress_statistics`)?"""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @cached_property
    def on_cpu(self) -> bool:
        return self.packed.is_cpu

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor of this weight."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, those that are None left out."""
        fields = {
            "packed": self.packed,
            "absmax": self.absmax,
            "nested_absmax": self.nested_absmax,
            "nested_code": self.nested_code,
            "nested_offset": self.nested_offset,
        }
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @cached_property
    def record(self) -> bytes:
        """The C description. It holds addresses: valid while this object lives."""
        scales, codes = (None, self.absmax) if self.is_nested else (self.absmax, None)
        parts = (
            *(self.packed, scales, codes),
            *(self.nested_absmax, self.nested_code, self.nested_offset),
        )
        pointers = (0 if part is None else part.data_ptr() for part in parts)
        return _RECORD.pack(*pointers, *self.shape, self.blocksize)

    def to(self, device: torch.device | str) -> NF4Weight:
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def scales(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Scales of blocks [start, stop), float32 [stop - start]."""
        part = self.absmax[start:stop]
        if self.nested_absmax is None or self.nested_code is None or self.nested_offset is None:
            return part
        groups = torch.arange(start, start + part.numel(), device=part.device) // NESTED_BLOCKSIZE
        # Multiply, then add: the two roundings of bitsandbytes, and of the C library.
        return self.nested_code[part.long()] * self.nested_absmax[groups] + self.nested_offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [out, in]: each weight is computed in float32 and rounded once to `dtype`."""
        return self.dequantize_rows(0, self.shape[0], dtype)

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [start, stop) of W, [stop - start, in]: for work by tiles, without a full copy."""
        width = self.shape[1]
        first, last = start * width, stop * width
        if first == last:
            return torch.empty(stop - start, width, dtype=dtype, device=self.device)
        first_byte, first_block = first // 2, first // self.blocksize
        pairs = self.packed.reshape(-1)[first_byte : (last + 1) // 2]
        codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).reshape(-1)
        codes = codes[first - 2 * first_byte :][: last - first]
        levels = torch.tensor(NF4_LEVELS, device=self.device)[codes.long()]
        scales = self.scales(first_block, (last - 1) // self.blocksize + 1)
        scales = scales.repeat_interleave(self.blocksize)[first - first_block * self.blocksize :]
        return (levels * scales[: last - first]).view(stop - start, width).to(dtype)

    @classmethod
    def quantize(cls, weight: Tensor, double_quant: bool = True) -> NF4Weight:
        """Quantise W [out, in] (float32, bfloat16 or float16) to bitsandbytes' bytes, blocks of 64.

        On the CPU it is computed here (quantization.py), elsewhere by bitsandbytes itself.
        """
        out, width = weight.shape
        if weight.device.type == "cpu":
            packed, absmax = quantize(weight.detach())
            if not double_quant:
                return cls(packed, absmax, (out, width))
            nested = quantize_scales(absmax)
            return cls(
                packed,
                nested.absmax,
                (out, width),
                nested_absmax=nested.nested_absmax,
                nested_code=nested.code,
                nested_offset=nested.offset,
            )
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight.contiguous(), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
        )
        if not double_quant:
            return cls(packed.reshape(-1), state.absmax.float(), (out, width))
        return cls(
            packed.reshape(-1),
            state.absmax,
            (out, width),
            nested_absmax=state.state2.absmax.float(),
            nested_code=state.state2.code.float(),
            nested_offset=state.offset.float(),
        )
