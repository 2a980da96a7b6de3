"""The numbers of a weights file, read in pieces: every one finite and of a sane size."""

from __future__ import annotations

import os
from collections.abc import Sequence

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
    if entry.dtype == "I32":
        raise InvalidAdapter("dtype I32, expected one of F32, F16, BF16", entry.name)
    for start in range(entry.start, entry.stop, CHUNK_BYTES):
        raw = os.pread(fd, min(CHUNK_BYTES, entry.stop - start), start)
        values = as_float32(raw, entry.dtype)
        # Written so that NaN fails too: every comparison with it is false.
        sane = np.abs(values) <= largest
        if positive:
            sane &= values > 0
        if len(raw) != min(CHUNK_BYTES, entry.stop - start) or not sane.all():
            raise InvalidAdapter(_complaint(values, sane, largest), entry.name)


def check_indices(fd: int, entry: TensorEntry, bounds: Sequence[int]) -> None:
    """Refuse what is no whole number from 0 to bounds[i] - 1 in row i of [len(bounds), n], or [n].

    Raises InvalidAdapter.
    """
    assert len(bounds) == (entry.shape[0] if len(entry.shape) > 1 else 1), entry
    row_bytes = (entry.stop - entry.start) // len(bounds)
    for row, bound in enumerate(bounds):
        first = entry.start + row * row_bytes
        for start in range(first, first + row_bytes, CHUNK_BYTES):
            raw = os.pread(fd, min(CHUNK_BYTES, first + row_bytes - start), start)
            values = np.frombuffer(raw, "<i4") if entry.dtype == "I32" else _floats(raw, entry)
            # Written so that NaN fails too: every comparison with it is false.
            sane = (values >= 0) & (values < bound) & (values == np.floor(values))
            if not sane.all():
                raise InvalidAdapter(
                    f"holds {values[~sane][0]:g} in row {row}, expected whole numbers from 0 to "
                    f"{bound - 1}",
                    entry.name,
                )


def _floats(raw: bytes, entry: TensorEntry) -> npt.NDArray[np.float32]:
    """PEFT on Windows saves indices as floats; half precision would have rounded them."""
    if entry.dtype != "F32":
        raise InvalidAdapter(f"dtype {entry.dtype}, expected I32 or F32", entry.name)
    return as_float32(raw, entry.dtype)


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
