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
_SCALE = 4  # bytes


@dataclass(frozen=True, eq=False)
class RoundedFactor:
    """A [r, in] or B [out, r] as signed bytes with float32 scales.

    round(127 w / m) with m = max |w| of a block; a block is 64 columns of a rank of A, and 32
    outputs of a rank of B. The error of a number is at most m / 254.
    """

    panels: Tensor  # uint8: of A [ceil(r / 8), in / 64, 544], of B [ceil(out / 32), 36 r]
    shape: tuple[int, int]
    side: Literal["A", "B"]

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
        out, rank = matrix.shape
        rows = functional.pad(matrix.detach().float(), (0, 0, 0, -out % OUTPUTS))
        numbers, scales = _rounded(rows.view(-1, OUTPUTS, rank).transpose(1, 2))
        lines = numbers.to(torch.int8).view(torch.uint8).flatten(1)
        ends = scales.contiguous().view(torch.uint8).flatten(1)
        return cls(torch.cat([lines, ends], -1), (out, rank), "B")

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
        cut = OUTPUTS * columns
        numbers = self.panels[:, :cut].view(torch.int8).reshape(-1, columns, OUTPUTS)
        scales = self.panels[:, cut:].contiguous().view(torch.float32)
        wide = numbers.float() * scales[..., None]
        return wide.transpose(0, 1).reshape(columns, -1)[:, :rows].contiguous().t()

    @property
    def device(self) -> torch.device:
        return self.panels.device

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def data_ptr(self) -> int:
        return self.panels.data_ptr()


def _rounded(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks along the last axis: whole numbers from -127 to 127, and a scale for each block."""
    largest = blocks.abs().amax(dim=-1)
    factor = torch.where(largest > 1e-36, 127 / largest, 0)
    return (blocks * factor[..., None]).round(), torch.where(largest > 1e-36, largest / 127, 0)
