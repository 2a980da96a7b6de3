"""Weights of the fast precision, laid out for products of bytes: csrc/fast.h says how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from .quantization import NF4_LEVELS
from .weight import NF4Weight

BLOCK = 64  # columns of one scale
PANEL_ROWS = 32  # rows of W in a panel
_SCALE_BYTES = 4 * PANEL_ROWS
_AT_ONCE = 1 << 20  # weights laid out at a time: a bound on temporary memory


@dataclass(frozen=True, eq=False)
class PanelWeight:
    """W [out, in] in panels of 32 rows, each block of 64 columns with its 32 scales beside it.

    `bits` 4: NF4, codes and scales of an `NF4Weight`, moved, nothing rounded: `dequantize` gives
    the same bits, and `unpack` the same codes. Only the products of this layout round.
    `bits` 8: signed bytes and a scale for each block; for an output head or an embedding.
    """

    panels: Tensor  # uint8 [ceil(out / 32), in / 64, 1152 for NF4, 2176 for 8 bits]
    shape: tuple[int, int]  # (out, in); in is a multiple of 64
    bits: int = 4
    is_nested: bool = False  # were the scales double-quantised before? They are plain here

    def __post_init__(self) -> None:
        out, width = self.shape
        size = PANEL_ROWS * BLOCK * self.bits // 8 + _SCALE_BYTES
        wanted = (-(-out // PANEL_ROWS), width // BLOCK, size)
        if self.bits not in (4, 8) or width % BLOCK:
            raise ValueError(
                f"panels have 4 or 8 bits and a multiple of {BLOCK} columns, got {self.bits} "
                f"bits and {width} columns"
            )
        if self.panels.dtype != torch.uint8 or tuple(self.panels.shape) != wanted:
            raise ValueError(
                f"panels of a weight {out}x{width} in {self.bits} bits must be uint8 "
                f"{list(wanted)}, got {self.panels.dtype} {list(self.panels.shape)}"
            )
        if not self.panels.is_contiguous():
            raise ValueError("the panels of a weight must be contiguous")

    @classmethod
    def pack(cls, weight: NF4Weight) -> PanelWeight:
        """The same weight in panels. Raises ValueError where `can_pack` says no."""
        if not can_pack(weight):
            raise ValueError(
                f"an NF4 weight {weight.shape[0]}x{weight.shape[1]} with blocks of "
                f"{weight.blocksize} cannot be laid out in panels: columns and blocks must be "
                f"multiples of {BLOCK}"
            )
        out, width = weight.shape
        kept = cls._empty(weight.shape, 4, weight.device)
        for start, stop in _stretches(weight.shape):
            codes = _codes(weight.packed, start * width, stop * width).view(stop - start, width)
            scales = _block_scales(weight, start, stop)
            rows = slice(start // PANEL_ROWS, -(-stop // PANEL_ROWS))
            kept[rows] = torch.cat([_lines4(_full(codes, 7)), _scale_bytes(scales)], dim=-1)
        return cls(kept, (out, width), 4, weight.is_nested)

    @classmethod
    def quantize8(cls, weight: Tensor) -> PanelWeight:
        """W [out, in], any float dtype, to 8 bits: round(127 w / m) with m = max |w| of its block.

        The error of a weight is at most m / 254.
        """
        rows = weight.detach()
        return cls.quantize8_rows((rows.shape[0], rows.shape[1]), lambda i, j: rows[i:j])

    @classmethod
    def quantize8_rows(
        cls, shape: tuple[int, int], read: Callable[[int, int], Tensor]
    ) -> PanelWeight:
        """The same of a matrix that nobody holds whole: `read` gives its rows [start, stop)."""
        width = shape[1]
        kept = cls._empty(shape, 8, torch.device("cpu"))
        for start, stop in _stretches(shape):
            blocks = read(start, stop).float().view(stop - start, -1, BLOCK)
            largest = blocks.abs().amax(dim=-1)
            factor = torch.where(largest > 1e-36, 127 / largest, 0)
            bytes8 = (blocks * factor[..., None]).round() + 128
            bytes8 = bytes8.to(torch.uint8).view(stop - start, width)
            rows = slice(start // PANEL_ROWS, -(-stop // PANEL_ROWS))
            kept[rows] = torch.cat([_lines8(_full(bytes8, 128)), _scale_bytes(largest / 127)], -1)
        return cls(kept, shape, 8)

    @staticmethod
    def _empty(shape: tuple[int, int], bits: int, device: torch.device) -> Tensor:
        size = PANEL_ROWS * BLOCK * bits // 8 + _SCALE_BYTES
        return torch.empty(
            (-(-shape[0] // PANEL_ROWS), shape[1] // BLOCK, size), dtype=torch.uint8, device=device
        )

    @property
    def device(self) -> torch.device:
        return self.panels.device

    @cached_property
    def on_cpu(self) -> bool:
        return self.panels.is_cpu

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"panels": self.panels}

    def to(self, device: torch.device | str) -> PanelWeight | NF4Weight:
        """On the CPU this weight; elsewhere NF4 in bitsandbytes' layout, which is read there."""
        if torch.device(device) == self.device:
            return self
        if self.bits == 8:
            raise ValueError(f"a weight in panels of 8 bits serves on the CPU, not on {device}")
        return self.unpack().to(device)

    def unpack(self) -> NF4Weight:
        """Back in bitsandbytes' layout, with plain scales."""
        codes, scales = self.codes_and_scales(0, self.shape[0])
        flat = codes.reshape(-1)
        return NF4Weight((flat[::2] << 4) | flat[1::2], scales.reshape(-1).clone(), self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [out, in], as `NF4Weight.dequantize` computes it."""
        return self.dequantize_rows(0, self.shape[0], dtype)

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [start, stop) of W, [stop - start, in]."""
        codes, scales = self.codes_and_scales(start, stop)
        if self.bits == 4:
            values = torch.tensor(NF4_LEVELS, device=self.device)[codes.long()]
        else:
            values = codes.float() - 128
        values = values.view(stop - start, self.shape[1] // BLOCK, BLOCK) * scales[..., None]
        return values.view(stop - start, self.shape[1]).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` of W in 8 bits, [..., in] float32: an embedding's look-up.

        The bits of `dequantize_rows`, but only the bytes of these rows are read.
        """
        assert self.bits == 8, "rows are looked up in 8 bits alone"
        flat = ids.reshape(-1)
        panel, row = flat // PANEL_ROWS, flat % PANEL_ROWS
        lines = self.panels[..., :-_SCALE_BYTES]
        lines = lines.view(*lines.shape[:2], BLOCK // 4, 2, 16, 4)
        own = lines[panel, :, :, row // 16, row % 16].flatten(2)  # [n, blocks, 64]
        scales = self.panels[..., -_SCALE_BYTES:].view(torch.float32)[panel, :, row]
        values: Tensor = (own.float() - 128) * scales[..., None]
        return values.view(*ids.shape, self.shape[1])

    def codes_and_scales(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows [start, stop): codes, or bytes 128 too many, [rows, in]; scales [rows, blocks]."""
        first = start // PANEL_ROWS
        part = self.panels[first : -(-stop // PANEL_ROWS)]
        rows = slice(start - first * PANEL_ROWS, stop - first * PANEL_ROWS)
        lines = part[..., :-_SCALE_BYTES]
        codes = _rows4(lines) if self.bits == 4 else _rows8(lines)
        scales = part[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
        return codes[rows], scales.transpose(1, 2).reshape(len(codes), part.shape[1])[rows]


def can_pack(weight: NF4Weight) -> bool:
    """Do rows start with a block of scales, and do 64 codes never need two?"""
    return weight.shape[1] % BLOCK == 0 and weight.blocksize % BLOCK == 0


def _stretches(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows, whole panels but for the last."""
    out, width = shape
    rows = max(1, _AT_ONCE // max(1, width) // PANEL_ROWS) * PANEL_ROWS
    for start in range(0, out, rows):
        yield start, min(out, start + rows)


def _codes(packed: Tensor, first: int, last: int) -> Tensor:
    pairs = packed.reshape(-1)[first // 2 : last // 2]
    return torch.stack((pairs >> 4, pairs & 15), dim=-1).reshape(-1)


def _block_scales(weight: NF4Weight, start: int, stop: int) -> Tensor:
    """A scale for each 64 weights of rows [start, stop): [stop - start, in / 64]."""
    width, size = weight.shape[1], weight.blocksize
    first = start * width // size
    scales = weight.scales(first, (stop * width - 1) // size + 1).repeat_interleave(size // BLOCK)
    skipped = (start * width - first * size) // BLOCK
    blocks = (stop - start) * width // BLOCK
    return scales[skipped : skipped + blocks].view(stop - start, -1)


def _full(rows: Tensor, zero: int) -> Tensor:
    """Rows up to a multiple of 32, the new ones full of what stands for zero."""
    return functional.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL_ROWS), value=zero)


def _scale_bytes(scales: Tensor) -> Tensor:
    """[rows, blocks] float32 -> [panels, blocks, 128] bytes."""
    full = _full(scales, 0).view(-1, PANEL_ROWS, scales.shape[1])
    return full.transpose(1, 2).contiguous().view(torch.uint8)


def _lines4(codes: Tensor) -> Tensor:
    """[rows, in] -> [panels, blocks, 1024]: (panel, half, row, block, eight, nibble, column)."""
    parts = codes.view(-1, 2, 16, codes.shape[1] // BLOCK, 8, 2, 4)
    parts = parts.permute(0, 3, 4, 1, 2, 6, 5)
    return (parts[..., 0] | (parts[..., 1] << 4)).flatten(2)


def _rows4(lines: Tensor) -> Tensor:
    parts = lines.view(*lines.shape[:2], 8, 2, 16, 4)
    parts = torch.stack((parts & 15, parts >> 4), dim=-1)
    return parts.permute(0, 3, 4, 1, 2, 6, 5).reshape(
        lines.shape[0] * PANEL_ROWS, lines.shape[1] * BLOCK
    )


def _lines8(bytes8: Tensor) -> Tensor:
    """[rows, in] -> [panels, blocks, 2048]: (panel, half, row, block, four, column)."""
    parts = bytes8.view(-1, 2, 16, bytes8.shape[1] // BLOCK, 16, 4)
    return parts.permute(0, 3, 4, 1, 2, 5).flatten(2)


def _rows8(lines: Tensor) -> Tensor:
    parts = lines.view(*lines.shape[:2], 16, 2, 16, 4)
    return parts.permute(0, 3, 4, 1, 2, 5).reshape(
        lines.shape[0] * PANEL_ROWS, lines.shape[1] * BLOCK
    )
