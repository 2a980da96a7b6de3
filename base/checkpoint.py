"""A checkpoint on disk: its safetensors files, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import UnservableBase

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


class Checkpoint:
    """The weight files of one directory and which tensor lies in which of them."""

    def __init__(self, directory: Path) -> None:
        self.files = weight_files(directory)
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            for key in _keys(file):
                if key in self._file_of:
                    raise UnservableBase(
                        f"tensor {key} is in {self._file_of[key].name} and again in {file.name}"
                    )
                self._file_of[key] = file

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU, a view of the mapped file.

        The file is opened anew each time: its pages count as ours until the last tensor read
        through one mapping is gone, so a mapping per tensor bounds the peak to about one tensor.
        """
        from safetensors import safe_open

        with safe_open(self._file_of[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, a view like that of `read`: only their pages count."""
        from safetensors import safe_open

        with safe_open(self._file_of[key], framework="pt") as file:
            rows: Tensor = file.get_slice(key)[start:stop]
        return rows


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The files that hold the weights: the shards of the index if there is one, else one file."""
    index = directory / INDEX
    if index.is_file():
        files = tuple(directory / name for name in shard_names(index))
    else:
        files = (directory / WEIGHTS,)
    for file in files:
        if not file.is_file():
            raise UnservableBase(_missing(directory, file.name))
    return files


def shard_names(index: Path) -> tuple[str, ...]:
    """The shards that an index names, sorted; each must be a plain file name beside it."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UnservableBase(f"{index.name} has no readable weight_map: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise UnservableBase(f"{index.name} names {name!r}; a shard is a file beside the index")
        if not name.endswith(".safetensors"):
            raise UnservableBase(f"{index.name} names {name!r}; only safetensors files are read")
    return tuple(sorted(names))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UnservableBase(f"{file.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnservableBase(f"{file.name} must hold a JSON object, it holds {type(content)}")
    return content


def _keys(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise UnservableBase(f"{file.name} is not a readable safetensors file: {error}") from error


def _missing(directory: Path, name: str) -> str:
    others = sorted(f.name for f in directory.iterdir() if f.suffix in _OTHER_WEIGHTS)
    if not others:
        return f"{directory} has no {name}"
    return (
        f"{directory} has no {name}, only {', '.join(others[:3])}: only safetensors are read, "
        "since the other formats can run code or need a conversion first"
    )
