"""The tensors of one adapter file, each to be consumed once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.errors import InvalidAdapter, UnsupportedMedia

_PREFIX = "base_model.model."  # PEFT saves the names of its wrapper, without the adapter's name


class AdapterCheckpoint:
    """adapter_model.safetensors, read tensor by tensor.

    `take` consumes; `finish` refuses whatever nobody took, so that no part of an adapter is
    dropped in silence. Use as a context manager.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._device = device
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

    def modules(self, leaves: tuple[str, ...]) -> dict[str, dict[str, str]]:
        """{module path: {leaf: tensor name}} of all tensors left that end in one of `leaves`.

        The first leaf that fits counts, so put the longer of two that end alike first.
        """
        found: dict[str, dict[str, str]] = {}
        for name in sorted(self._left):
            inner = name.removeprefix(_PREFIX)
            leaf = next((leaf for leaf in leaves if inner.endswith(f".{leaf}")), None)
            if inner != name and leaf is not None:
                found.setdefault(inner[: -len(leaf) - 1], {})[leaf] = name
        return found

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in float32 on the device, in its own memory. Raises InvalidAdapter."""
        assert name in self._left, f"{name} was taken already"
        tensor: Tensor = self._file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise InvalidAdapter(f"has shape {list(tensor.shape)}, needs {list(shape)}", name)
        self._left.discard(name)
        # A copy even where nothing is cast: the file's memory map must not outlive the file.
        return tensor.to(self._device, torch.float32, copy=True)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def finish(self) -> None:
        """Raise InvalidAdapter, naming a tensor that nobody took."""
        if self._left:
            name = min(self._left)
            others = len(self._left) - 1
            more = f", and so are {others} others" if others else ""
            raise InvalidAdapter(f"nothing in the base or the config takes this tensor{more}", name)


def required(parts: Mapping[str, str], leaf: str, path: str) -> str:
    """The name of a tensor that must be there. Raises InvalidAdapter."""
    if leaf not in parts:
        raise InvalidAdapter("this tensor is missing", f"{_PREFIX}{path}.{leaf}")
    return parts[leaf]
