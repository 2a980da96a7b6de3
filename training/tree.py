"""Nested state of tensors and plain values in one safetensors file: nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_KEY = "tree"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within it, where to write what is to stand at `path`: whole or not at all. Raises OSError,
    for safetensors too."""
    written = path.with_name(f".{path.name}.tmp")
    try:
        yield written
        with written.open("rb+") as file:
            os.fsync(file.fileno())
        written.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None
    finally:
        written.unlink(missing_ok=True)


def write_tree(path: Path, value: Any) -> None:
    """Dicts of any plain keys, lists, tuples, tensors and plain values; whole or not at all."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_packed(value, tensors))
    with replacing(path) as written:
        save_file(tensors, written, metadata={_KEY: tree})


def read_tree(path: Path) -> Any:
    """What `write_tree` was given. Raises OSError or ValueError."""
    try:
        with safe_open(path, "pt") as file:
            tree = json.loads((file.metadata() or {})[_KEY])
            return _unpacked(tree, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from None


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(inner, tensors) for inner in value]}
    return value


def _unpacked(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, inner),) = tree.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: _unpacked(value, tensors) for key, value in inner}
    items = [_unpacked(value, tensors) for value in inner]
    return items if kind == "list" else tuple(items)
