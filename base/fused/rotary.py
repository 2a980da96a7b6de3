"""Angles of the rotary embedding, computed once for each position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 64  # positions computed at a time: always the same ones together


class RotaryTable:
    """cos and sin of every position so far, [positions, dim], as transformers' module gives them.

    Torch may round the cosine of one angle in two ways, by where it stands in a tensor; a row of
    this table is computed once and in one place, so each position has its own bits.
    """

    def __init__(self, rotary: Any, layer_type: str | None = None) -> None:
        self._rotary = rotary
        self._more = {} if layer_type is None else {"layer_type": layer_type}
        self._cos, self._sin = torch.empty(0, 0), torch.empty(0, 0)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos, sin [T, dim]."""
        needed = int(positions.max()) + 1 if positions.numel() else 0
        if needed > len(self._cos):
            self._grow(max(needed, 2 * len(self._cos)))
        return self._cos[positions], self._sin[positions]

    def _grow(self, needed: int) -> None:
        cos, sin = ([table] if len(table) else [] for table in (self._cos, self._sin))
        like = torch.empty(0)  # for its dtype and device
        for start in range(len(self._cos), needed, _CHUNK):
            chunk = torch.arange(start, start + _CHUNK)[None]
            one_cos, one_sin = self._rotary(like, chunk, **self._more)
            cos.append(one_cos[0])
            sin.append(one_sin[0])
        self._cos, self._sin = torch.cat(cos), torch.cat(sin)
