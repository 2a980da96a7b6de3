"""csrc/ through ctypes: the structures of accept.h, and the library where there is one."""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_double,
    c_int,
    c_int64,
    c_size_t,
    c_void_p,
)
from pathlib import Path
from typing import Any

LIBRARY = "_net.so"
REASON = "_net.txt"  # why there is no library
BATCH = 64  # connections taken at once


class Reply(Structure):
    _fields_ = [
        ("content", c_char_p),
        ("size", c_size_t),
        ("id_at", c_size_t),
        ("date_at", c_size_t),
    ]


class Rules(Structure):
    _fields_ = [
        ("head_seconds", c_double),
        ("grace_seconds", c_double),
        ("bytes_per_second", c_double),
        ("silence_seconds", c_double),
        ("linger_seconds", c_double),
        ("linger_bytes", c_int64),
        ("head_bytes", c_int64),
        ("body_bytes", c_int64),
        ("all_bytes", c_int64),
        ("late", Reply),
        ("late_v1", Reply),
        ("stopping", Reply),
        ("id_prefix", c_char * 10),
        ("max_open", ctypes.c_int32),
    ]


class Counts(Structure):
    """`open` is ours to write, all else the filter's."""

    _fields_ = [
        ("held", ctypes.c_int32),
        ("open", ctypes.c_int32),
        ("bytes", c_int64),
        ("late", c_int64),
        ("closed", c_int64),
        ("starved", c_int64),
    ]


class Taken(Structure):
    _fields_ = [
        ("content", c_void_p),
        ("size", c_size_t),
        ("waited", c_double),
        ("descriptor", ctypes.c_int32),
        ("family", ctypes.c_int32),
        ("full", ctypes.c_int32),
    ]


class Library:
    """The functions of accept.h. Raises OSError, AttributeError."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path), use_errno=True)
        # Short, and called by the event loop: to hand the interpreter over would take longer.
        quick = ctypes.PyDLL(str(path))
        self.start = _function(
            library.accept_start, c_void_p, POINTER(Rules), POINTER(Counts), POINTER(c_int), c_int
        )
        self.event = _function(quick.accept_event, c_int, c_void_p)
        self.take = _function(quick.accept_take, c_int, c_void_p, POINTER(Taken), c_int)
        self.stop = _function(library.accept_stop, None, c_void_p)
        self.end = _function(library.accept_end, None, c_void_p)


def _function(found: Any, result: Any, *arguments: Any) -> Any:
    found.restype, found.argtypes = result, arguments
    return found


def load(folder: Path | None = None) -> tuple[Library | None, str]:
    """The library of `folder` (default: this package), and one line about it."""
    if not sys.platform.startswith("linux"):
        return None, "needs epoll, so Linux"
    if os.environ.get("NIBBLE_NATIVE") == "0":
        return None, "off: NIBBLE_NATIVE=0"
    path = (folder or Path(__file__).parent) / LIBRARY
    if not path.exists():
        reason = path.with_name(REASON)
        why = reason.read_text().strip() if reason.exists() else "python -m service.net.build"
        return None, f"not built: {why}"
    try:
        return Library(path), "a thread holds connections until their first request is there"
    except (OSError, AttributeError) as error:
        return None, f"not loaded: {error}"
