"""Factors of low-rank terms in 8 bits, laid out for the fast products: csrc/terms.h says how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .panels import BLOCK

RANKS = 8  # of a panel of A
OUTPUTS = 32  # of a panel of B


@dataclass(frozen=True, eq=False)
class RoundedFactor:
    """A [r, in] or B [out, r] as signed bytes with scales.

    A: round(127 w / m) with m = max |w| of 64 columns of a rank. B: the same of w / c, with c the
    largest |w| of its rank and m that of up to 64 ranks of an output. The error of a number is at
    most m / 254, or c m / 252: m of B is rounded up to bfloat16.
    """

    panels: Tensor  # uint8: of A [ceil(r / 8), in / 64, 544], of B [ceil(out / 32), see _of_ranks]
    shape: tuple[int, int]
    side: Literal["A", "B"]
    columns: Tensor | None = None  # c of B, float32 [r]

    @classmethod
    def of_a(cls, matrix: Tensor) -> RoundedFactor:
        """A [r, in], any float dtype. Raises ValueError where in is no multiple of 64."""
        rank, width = matrix.shape
        if width % BLOCK:
            raise ValueError(f"a factor in 8 bits needs a multiple of {BLOCK} columns, got {width}")
        rows = functional.pad(matrix.detach().float(), (0, 0, 0, -rank % RANKS))
        numbers, scales = _rounded(rows.view(-1, RANKS, width // BLOCK, BLOCK))
        # (panel, rank, block, column) -> (panel, block, eight columns, rank, column)
        lines = (numbers + 128).to(torch.uint8).view(-1, RANKS, width // BLOCK, 8, 8)
        lines = lines.permute(0, 2, 3, 1, 4)
        ends = scales.transpose(1, 2).contiguous().view(torch.uint8)
        return cls(torch.cat([lines.flatten(2), ends], -1), (rank, width), "A")

    @classmethod
    def of_b(cls, matrix: Tensor) -> RoundedFactor:
        """B [out, r], any float dtype."""
        rows = functional.pad(matrix.detach().float(), (0, 0, 0, -matrix.shape[0] % OUTPUTS))
        columns = rows.abs().amax(0) if len(rows) else rows.new_zeros(matrix.shape[1])
        columns = torch.where(columns > 1e-36, columns, 0)
        rows = torch.where(columns > 0, rows / columns, 0)
        parts = (
            [_of_ranks(part) for part in torch.split(rows, BLOCK, dim=1)] if matrix.shape[1] else []
        )
        panels = torch.cat(parts, -1) if parts else rows.new_empty(0, 0, dtype=torch.uint8)
        return cls(panels, (matrix.shape[0], matrix.shape[1]), "B", columns)

    def dense(self) -> Tensor:
        """The matrix that the products read, in float32; of B the columns are contiguous."""
        rows, columns = self.shape
        if self.side == "A":
            cut = RANKS * BLOCK
            lines = self.panels[..., :cut].reshape(-1, columns // BLOCK, 8, RANKS, 8)
            lines = lines.permute(0, 3, 1, 2, 4)
            scales = self.panels[..., cut:].contiguous().view(torch.float32).transpose(1, 2)
            wide: Tensor = (lines.flatten(3).float() - 128) * scales[..., None]
            return wide.reshape(-1, columns)[:rows]
        assert self.columns is not None
        parts, start = [], 0
        for first in range(0, columns, BLOCK):
            fours = -(-min(BLOCK, columns - first) // 4)
            cut = start + 4 * fours * OUTPUTS
            numbers = self.panels[:, start:cut].view(-1, fours, OUTPUTS, 4).transpose(1, 2)
            start = cut + 2 * OUTPUTS
            scales = self.panels[:, cut:start].contiguous().view(torch.bfloat16).float()
            parts.append(((numbers.flatten(2).float() - 128) * scales[..., None]).flatten(0, 1))
        wide = torch.cat([part[:rows] for part in parts], 1)[:, :columns] * self.columns
        return wide.t().contiguous().t()

    @property
    def device(self) -> torch.device:
        return self.panels.device

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + (0 if self.columns is None else self.columns.nbytes)

    def data_ptr(self) -> int:
        return self.panels.data_ptr()


def _rounded(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks along the last axis: whole numbers from -127 to 127, and a scale for each block."""
    largest = blocks.abs().amax(dim=-1)
    factor = torch.where(largest > 1e-36, 127 / largest, 0)
    return (blocks * factor[..., None]).round(), torch.where(largest > 1e-36, largest / 127, 0)


def _of_ranks(part: Tensor) -> Tensor:
    """Up to 64 columns of B, its outputs a multiple of 32: [panels, 32 R + 64] bytes, with R the
    ranks up to a multiple of 4. Lines of 4 ranks of 32 outputs, w8 + 128; then 32 scales in
    bfloat16."""
    scale = part.abs().amax(-1) / 127
    kept = scale.to(torch.bfloat16)
    kept = torch.where(
        kept.float() < scale, (kept.view(torch.int16) + 1).view(torch.bfloat16), kept
    )
    factor = torch.where(kept > 0, 1 / kept.float(), 0)
    numbers = (part * factor[:, None]).round().clamp(-127, 127) + 128
    numbers = functional.pad(numbers, (0, -part.shape[1] % 4), value=128).to(torch.uint8)
    lines = numbers.view(-1, OUTPUTS, numbers.shape[1] // 4, 4).transpose(1, 2).flatten(1)
    return torch.cat([lines, kept.view(-1, OUTPUTS).view(torch.uint8)], -1)
