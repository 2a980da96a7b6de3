"""The header of a safetensors file, checked before anything else reads the file.

A file is: 8 bytes N (little endian), N bytes of JSON, the tensors' bytes. The reference reader
accepts duplicate keys and a million empty tensors; this one bounds the header first.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from adapters.errors import InvalidAdapter, StoreUnavailable, TooLarge, UnsupportedMedia
from adapters.json_fault import fault
from adapters.limits import Limits

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4}
MAX_NAME = 512
MAX_DIMENSIONS = 4

# First bytes of what people upload by mistake (or not by mistake), and what to call it.
FOREIGN = (
    (
        b"PK",
        "a zip archive (torch.save writes these); send what is in it, or what PEFT's "
        "save_pretrained writes: adapter_model.safetensors",
    ),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    *((bytes([0x80, protocol]), "a pickle") for protocol in range(1, 6)),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, stop) of the file."""

    name: str
    dtype: str  # "F32" | "F16" | "BF16"; "I32" for indices alone
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    file_bytes: int


OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


@contextmanager
def open_regular(path: Path, where: str = "weights") -> Iterator[int]:
    """A read-only descriptor of a regular file; links, pipes and devices are refused.

    Raises InvalidAdapter; StoreUnavailable where the machine is at fault, not the file.
    """
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for ever for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, OSError) and error.errno in OURS:
            raise StoreUnavailable(f"the {where} cannot be opened: {reason}") from error
        raise InvalidAdapter(f"cannot be opened as a regular file: {reason}", where) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidAdapter("is not a regular file", where)
        yield fd
    finally:
        os.close(fd)


def read_header(fd: int, limits: Limits) -> Header:
    """Parse and check the header of the open file.

    Raises UnsupportedMedia (not safetensors), TooLarge (a limit), InvalidAdapter (anything else).
    """
    file_bytes = os.fstat(fd).st_size
    if file_bytes > limits.max_weights_bytes:
        raise TooLarge(f"{file_bytes} bytes, limit {limits.max_weights_bytes}", "weights")
    head = os.pread(fd, 512, 0)
    if len(head) < 9:
        raise UnsupportedMedia(f"{len(head)} bytes are too short for safetensors", "weights")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{":
        raise UnsupportedMedia(f"not safetensors but {_foreign(head)}", "weights")
    if length > limits.max_header_bytes:
        raise TooLarge(f"header of {length} bytes, limit {limits.max_header_bytes}", "weights")
    if 8 + length > file_bytes:
        raise InvalidAdapter(
            f"header of {length} bytes in a file of {file_bytes}: the file is cut short", "weights"
        )
    table = _parse(os.pread(fd, length, 8))
    metadata = _metadata(table.pop("__metadata__", {}))
    if len(table) > limits.max_tensors:
        raise TooLarge(f"{len(table)} tensors, limit {limits.max_tensors}", "weights")
    entries = [_entry(name, row, 8 + length) for name, row in table.items()]
    _check_contiguous(entries, 8 + length, file_bytes)
    return Header({entry.name: entry for entry in entries}, metadata, file_bytes)


def _foreign(head: bytes) -> str:
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((what for magic, what in FOREIGN if head.startswith(magic)), "an unknown format")


def _parse(raw: bytes) -> dict[str, Any]:
    return parse_json_object(raw, "weights", "header")


def parse_json_object(raw: bytes, where: str, what: str) -> dict[str, Any]:
    """Strict JSON: one object, no duplicate keys, no NaN. Raises InvalidAdapter."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise InvalidAdapter(f"key {twice[:MAX_NAME]!r} appears twice in the {what}", where)
        return found

    def no_constant(name: str) -> None:
        raise InvalidAdapter(f"{name} is not a JSON number", where)

    try:
        table = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant
        )
    except json.JSONDecodeError as error:
        raise InvalidAdapter(f"the {what} is not JSON: {fault(error)}", where) from error
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"the {what} is not JSON: {str(error)[:200]}", where) from error
    if not isinstance(table, dict):
        raise InvalidAdapter(f"the {what} is not a JSON object", where)
    return table


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InvalidAdapter("must map strings to strings", "__metadata__")
    return value


def _entry(name: str, row: Any, data_start: int) -> TensorEntry:
    if not name or len(name) > MAX_NAME or not name.isascii() or not name.isprintable():
        raise InvalidAdapter(
            f"a tensor's name must be 1 to {MAX_NAME} printable ASCII characters", name[:64]
        )
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise InvalidAdapter("wants exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InvalidAdapter(
            f"dtype {str(dtype)[:16]}, expected one of {', '.join(ITEM_BYTES)}", name
        )
    if not _counts(shape) or not 1 <= len(shape) <= MAX_DIMENSIONS or 0 in shape:
        raise InvalidAdapter(
            f"shape {str(shape)[:80]}, expected 1 to {MAX_DIMENSIONS} positive dimensions", name
        )
    if not _counts(offsets) or len(offsets) != 2:
        raise InvalidAdapter(f"data_offsets {str(offsets)[:80]}, expected [start, stop]", name)
    start, stop = offsets
    if stop - start != prod(shape) * ITEM_BYTES[dtype]:
        raise InvalidAdapter(
            f"{stop - start} bytes for {dtype} {list(shape)}, "
            f"expected {prod(shape) * ITEM_BYTES[dtype]}",
            name,
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _counts(value: Any) -> bool:
    """A list of integers >= 0 that fit in 63 bits; True and False are no integers here."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_contiguous(entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    at = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != at:
            what = "overlaps the tensor before it" if entry.start < at else "leaves a gap before it"
            raise InvalidAdapter(
                f"starts at byte {entry.start - data_start} of the data and {what}: "
                f"expected {at - data_start}",
                entry.name,
            )
        at = entry.stop
    if at != file_bytes:
        what = "cut short" if at > file_bytes else "followed by bytes that no tensor uses"
        raise InvalidAdapter(
            f"the tensors end at byte {at}, the file at {file_bytes}: the data is {what}", "weights"
        )
