"""The numbers of a weights file, read in pieces: every one finite and of a sane size."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from adapters.errors import InvalidAdapter
from adapters.limits import MIB
from adapters.safetensors_header import TensorEntry

CHUNK_BYTES = 4 * MIB


def check_values(fd: int, entry: TensorEntry, largest: float, positive: bool = False) -> None:
    """Refuse NaN, infinities, numbers beyond ±largest, and numbers <= 0 where `positive`.

    Memory stays at a few chunks whatever the tensor's size. Raises InvalidAdapter.
    """
    for start in range(entry.start, entry.stop, CHUNK_BYTES):
        raw = os.pread(fd, min(CHUNK_BYTES, entry.stop - start), start)
        values = as_float32(raw, entry.dtype)
        # Written so that NaN fails too: every comparison with it is false.
        sane = np.abs(values) <= largest
        if positive:
            sane &= values > 0
        if len(raw) != min(CHUNK_BYTES, entry.stop - start) or not sane.all():
            raise InvalidAdapter(_complaint(values, sane, largest), entry.name)


def as_float32(raw: bytes, dtype: str) -> npt.NDArray[np.float32]:
    """[n] fp32 of little-endian F32, F16 or BF16 bytes."""
    if dtype == "BF16":
        bits = np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype(np.float32)


def _complaint(values: npt.NDArray[np.float32], sane: npt.NDArray[np.bool_], largest: float) -> str:
    if sane.all():
        return "the file became shorter while it was read"
    worst = values[~sane][0]
    if not np.isfinite(worst):
        return f"holds {worst}: every number must be finite"
    return f"holds {worst:g}, expected a number within ±{largest:g}, and a magnitude above 0"
