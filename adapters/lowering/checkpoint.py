"""The tensors of one adapter file, each to be consumed once."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from adapters.errors import InvalidAdapter, StoreUnavailable, UnsupportedMedia
from adapters.limits import Limits
from adapters.safetensors_header import ITEM_BYTES, TensorEntry, read_header
from base.dense import is_copy
from base.kernels import PanelWeight

WRAPPED = "base_model.model."  # PEFT saves the paths below its own two wrappers
UNWRAPPED = "base_model."  # or one, where a method changes no layer
_SHARED = "base_model."  # and what all layers share beside the inner one
_LIMITS = Limits(max_weights_bytes=sys.maxsize)  # how large they may be was asked at the upload
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
}


class AdapterCheckpoint:
    """adapter_model.safetensors, read tensor by tensor; names are module path and leaf.

    `take` consumes; `finish` refuses whatever nobody took, so that no part of an adapter is
    dropped in silence. Use as a context manager, in one thread.

    Not by `safetensors.safe_open`: each tensor that it gives for torch leaves two integers behind
    for as long as the process lives (0.8.0), and a server lowers for as long as it lives.
    """

    def __init__(self, path: Path, device: torch.device, root: str = WRAPPED) -> None:
        """`root` is what PEFT put before the module paths."""
        self._device = device
        self._root = root
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise UnsupportedMedia(f"the weights cannot be read: {error}") from error
        try:
            self._entries = read_header(self._file.fileno(), _LIMITS).tensors
        except BaseException:
            self._file.close()
            raise
        self._left = set(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def has(self, name: str) -> bool:
        """Is this tensor in the file, and not taken yet?"""
        return self._root + name in self._left

    def peek(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in float32 on the device; the tensor is still to be taken."""
        entry = self._entries[self._root + name]
        return self._read(entry, start, stop).to(self._device, torch.float32)

    def leave(self, *names: str) -> None:
        """These, as far as they are there, say nothing that others do not: they count as taken."""
        self._left.difference_update(self._root + name for name in names)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor in float32 on the device, in its own memory.

        Raises InvalidAdapter where it is missing or has another shape.
        """
        return self._take(self._root + name, shape)

    def take_shared(self, name: str, *shape: int) -> Tensor:
        """`take` for a tensor that belongs to no module: a projection or bank of all layers."""
        return self._take(_SHARED + name, shape)

    def take_bare(self, name: str, *shape: int) -> Tensor:
        """`take` for a tensor that PEFT saves without a path: a prompt encoder's."""
        return self._take(name, shape)

    def take_base_copy(self, path: str, own: Any) -> None:
        """PEFT saves the base's own table beside an adapter on it: it must be this base's.

        `own` is the base's weight. Raises InvalidAdapter where the file's differs.
        """
        name = f"{path}.base_layer.weight"
        in_8_bits = isinstance(own, PanelWeight) and own.bits == 8
        if not self.has(name) or not (isinstance(own, Tensor) or in_8_bits):
            return  # a copy of a quantised weight stays, and is refused as left over
        if not is_copy(self.take(name, *own.shape), own):
            raise InvalidAdapter(
                "differs from the base's own: a table that was resized or trained as well "
                "belongs in modules_to_save",
                name,
            )

    def take_indices(self, name: str, *shape: int) -> Tensor:
        """`take` for whole numbers, int64: in float32 those above 2^24 would be rounded."""
        return self._take(self._root + name, shape, torch.int64)

    def _take(
        self, full: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        if full not in self._left:
            raise InvalidAdapter(f"this tensor is missing, shape {list(shape)}", full)
        entry = self._entries[full]
        if entry.shape != shape:
            raise InvalidAdapter(f"shape {list(entry.shape)}, expected {list(shape)}", full)
        self._left.discard(full)
        return self._read(entry, 0, shape[0]).to(self._device, dtype)

    def _read(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as they are in the file, on the CPU, in memory of their own."""
        inner = entry.shape[1:]
        rows = torch.empty((stop - start, *inner), dtype=_DTYPES[entry.dtype])
        left = rows.view(-1).view(torch.uint8).numpy().data
        try:
            self._file.seek(entry.start + start * prod(inner) * ITEM_BYTES[entry.dtype])
            while left:
                left = left[self._filled(left, entry) :]
        except OSError as error:
            raise StoreUnavailable(f"the weights cannot be read: {error.strerror}") from error
        return rows

    def _filled(self, left: memoryview, entry: TensorEntry) -> int:
        """How many of the bytes that are left the file gave now."""
        got = self._file.readinto(left)
        if not got:
            raise StoreUnavailable(f"the weights were cut short within {entry.name}")
        return got

    def finish(self) -> None:
        """Raise InvalidAdapter, naming a tensor that nobody took."""
        if self._left:
            name, others = min(self._left), len(self._left) - 1
            more = f" (and {others} more)" if others else ""
            raise InvalidAdapter(f"left over: nothing in the config takes this tensor{more}", name)
