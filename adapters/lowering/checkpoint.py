"""The tensors of one adapter file, each to be consumed once."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.errors import InvalidAdapter, UnsupportedMedia
from base.dense import is_copy
from base.kernels import PanelWeight

WRAPPED = "base_model.model."  # PEFT saves the paths below its own two wrappers
UNWRAPPED = "base_model."  # or one, where a method changes no layer
_SHARED = "base_model."  # and what all layers share beside the inner one


class AdapterCheckpoint:
    """adapter_model.safetensors, read tensor by tensor; names are module path and leaf.

    `take` consumes; `finish` refuses whatever nobody took, so that no part of an adapter is
    dropped in silence. Use as a context manager.
    """

    def __init__(self, path: Path, device: torch.device, root: str = WRAPPED) -> None:
        """`root` is what PEFT put before the module paths."""
        self._device = device
        self._root = root
        opened: Any = safe_open  # the package has no types
        try:
            self._file = opened(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise UnsupportedMedia(f"the weights are no readable safetensors: {error}") from error
        self._left: set[str] = set(self._file.keys())

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def has(self, name: str) -> bool:
        """Is this tensor in the file, and not taken yet?"""
        return self._root + name in self._left

    def peek(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in float32 on the device; the tensor is still to be taken."""
        rows: Tensor = self._file.get_slice(self._root + name)[start:stop]
        return rows.to(self._device, torch.float32, copy=True)

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
        tensor: Tensor = self._file.get_tensor(full)
        if tuple(tensor.shape) != shape:
            raise InvalidAdapter(f"shape {list(tensor.shape)}, expected {list(shape)}", full)
        self._left.discard(full)
        # A copy even where nothing is cast: the file's memory map must not outlive the file.
        return tensor.to(self._device, dtype, copy=True)

    def finish(self) -> None:
        """Raise InvalidAdapter, naming a tensor that nobody took."""
        if self._left:
            name, others = min(self._left), len(self._left) - 1
            more = f" (and {others} more)" if others else ""
            raise InvalidAdapter(f"left over: nothing in the config takes this tensor{more}", name)
