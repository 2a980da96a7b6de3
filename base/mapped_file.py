"""One safetensors file of tensors that are read through a mapping: checked, never copied."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_ALIGNMENT = 64  # of every tensor in the file, as torch's own allocations; mappings start on pages
_LARGEST_HEADER = 1 << 26
_LEFT_BEHIND = 3600  # seconds after which a temporary file is no other process's work
_SECOND = 1_000_000_000
_DTYPES = {
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class DamagedFile(ValueError):
    """The file is not, byte for byte, what was written."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """The tensors of a file, each a view of the mapping, and the notes that were written along."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, str]


def write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Put CPU tensors in a file, all or nothing: whoever opens it sees the old one or the new.

    Raises OSError, and ValueError for a dtype that is not kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    # The time of change is part of the header: a file that still has it was not written to since.
    written = time.time_ns() // _SECOND * _SECOND
    header = _header(tensors, {**notes, "written_ns": str(written)})
    handle, name = tempfile.mkstemp(suffix=".tmp", prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            for part in _payload(tensors):
                file.write(part)
            file.flush()
            os.utime(name, ns=(written, written))
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    _sync_directory(path.parent)


def read(path: Path) -> Mapped:
    """Map a file that `write` wrote. Its pages are shared by all processes that read it.

    The header is checked by its sha-256. The tensors are, too, when the file's time of change is
    not the one in the header; otherwise nobody wrote to it, and a big file is not read for it.
    Raises FileNotFoundError, OSError, and DamagedFile with the reason.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        start, header = _read_header(file, status.st_size)
        # Private: what somebody writes to a tensor stays in that process.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    notes = header.pop("__metadata__")
    written = int(notes.pop("written_ns"))
    checksum = notes.pop("payload_sha256")
    if status.st_mtime_ns != written:
        if _sha256(memoryview(mapping)[start:]) != checksum:
            raise DamagedFile("its tensors are not those that were written")
        with suppress(OSError):  # so that the next start need not read it all again
            os.utime(path, ns=(written, written))
    tensors = {
        name: _view(mapping, start, row)
        for name, row in header.items()
        if not name.startswith(_PADDING)
    }
    return Mapped(tensors, notes)


_PADDING = "padding."


def _header(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> bytes:
    rows: dict[str, Any] = {}
    position, numbers = 0, count()
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which is not kept")
        end = position + tensor.nbytes
        rows[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end + -end % _ALIGNMENT
        if position > end:  # the format allows no holes
            rows[f"{_PADDING}{next(numbers)}"] = {
                "dtype": "U8",
                "shape": [position - end],
                "data_offsets": [end, position],
            }
    digest = hashlib.sha256()
    for part in _payload(tensors):
        digest.update(part)
    notes = {**notes, "payload_sha256": digest.hexdigest()}
    notes["header_sha256"] = _header_sha256(rows, notes)
    text = json.dumps({"__metadata__": notes, **rows}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _payload(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        yield flat.numpy().data
        if flat.numel() % _ALIGNMENT:
            yield memoryview(bytes(-flat.numel() % _ALIGNMENT))


def _read_header(file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    """(where the tensors start, the header), after every check that does not read tensors."""
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= min(_LARGEST_HEADER, size):
        raise DamagedFile(f"it has no header: {size} bytes")
    try:
        header = json.loads(file.read(length))
        notes = dict(header["__metadata__"])
        checksum = notes.pop("header_sha256")
        rows = {name: row for name, row in header.items() if name != "__metadata__"}
        whole = max((row["data_offsets"][1] for row in rows.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"its header is not readable: {error!r}") from error
    if checksum != _header_sha256(rows, notes):
        raise DamagedFile("its header is not the one that was written")
    if size != 8 + length + whole:
        raise DamagedFile(f"it has {size} bytes, {8 + length + whole} were written")
    return 8 + length, {"__metadata__": notes, **rows}


def _header_sha256(rows: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([rows, notes], sort_keys=True).encode()).hexdigest()


def _sha256(part: memoryview) -> str:
    with part:
        return hashlib.sha256(part).hexdigest()


def _view(mapping: mmap.mmap, start: int, row: Mapping[str, Any]) -> Tensor:
    dtype, (first, last) = _DTYPES[row["dtype"]], row["data_offsets"]
    numel = (last - first) // dtype.itemsize
    if numel == 0:
        return torch.empty(row["shape"], dtype=dtype)
    flat = torch.frombuffer(mapping, dtype=dtype, count=numel, offset=start + first)
    return flat.view(row["shape"])


def _sweep(folder: Path) -> None:
    """Remove what a crash left behind."""
    for left in folder.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_BEHIND:
                left.unlink()


def _sync_directory(folder: Path) -> None:
    with suppress(OSError):  # not every system can open a directory
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
