"""Weights files written by hand, byte by byte: what no honest program would save."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

ITEM = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}


def safetensors_bytes(
    tensors: Mapping[str, tuple[str, list[int], bytes | None]],
    *,
    metadata: Any = None,
    patch: Mapping[str, Mapping[str, Any]] | None = None,
    tail: bytes = b"",
) -> bytes:
    """A safetensors file; None stands for zero bytes. `patch` overwrites rows of the header."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        raw = bytes(prod(shape) * ITEM[dtype]) if raw is None else raw
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        header[name] |= (patch or {}).get(name, {})
        data += raw
    return framed(json.dumps(header).encode(), data + tail)


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """The file of a raw header, with its length told truly or not."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def shapes_of(path: Path) -> dict[str, tuple[str, list[int], bytes | None]]:
    """The tensors of a good file, in the form that `safetensors_bytes` takes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = raw[8 + length :]
    return {
        name: (row["dtype"], row["shape"], data[slice(*row["data_offsets"])])
        for name, row in header.items()
    }
